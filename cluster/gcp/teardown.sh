#!/usr/bin/env bash
# Remove what gcp/prepare.sh has made, after `ray down`. The bucket stays: it holds the results.
#
#   cluster/gcp/teardown.sh PROJECT ZONE
set -euo pipefail

if [[ $# -ne 2 ]]; then
    echo "usage: $0 PROJECT ZONE" >&2
    exit 2
fi
project=$1
export CLOUDSDK_CORE_PROJECT=$project CLOUDSDK_COMPUTE_REGION=${2%-*} CLOUDSDK_CORE_DISABLE_PROMPTS=1

running=$(gcloud compute instances list --filter labels.ray-cluster-name=softseg --format 'value(name)')
if [[ -n $running ]]; then
    echo "error: machines of the cluster are still there ($running); run: ray down my-cluster.yaml" >&2
    exit 1
fi
remove() { # its name, then the words of gcloud for its kind; what is not there needs no deleting
    if gcloud "${@:2}" describe "$1" > /dev/null 2>&1; then gcloud "${@:2}" delete "$1"; fi
}
remove softseg-ssh compute firewall-rules
remove softseg-inside compute firewall-rules
remove softseg compute networks subnets
remove softseg compute networks
remove "softseg-head@$project.iam.gserviceaccount.com" iam service-accounts
remove "softseg-worker@$project.iam.gserviceaccount.com" iam service-accounts
rm -f ~/.softseg/gcp/auth_token
echo "Removed. Left: the bucket with your runs, and the service account ray-autoscaler-sa-v1 that Ray itself has made."

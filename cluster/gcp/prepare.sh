#!/usr/bin/env bash
# Make what gcp/cluster.yaml needs, once, and write a copy of it that `ray up` can use. Running it again changes nothing
# but the address that may use SSH.
#
#   cluster/gcp/prepare.sh PROJECT ZONE BUCKET REGISTRY MY_ADDRESS/32 > my-cluster.yaml
#
# REGISTRY/softseg:<Ray version> is the image made from cluster/Dockerfile. MY_ADDRESS is yours, as the internet sees it.
set -euo pipefail

if [[ $# -ne 5 ]]; then
    echo "usage: $0 PROJECT ZONE BUCKET REGISTRY MY_ADDRESS/32" >&2
    exit 2
fi
project=$1 zone=$2 bucket=$3 registry=$4 address=$5
if [[ $address == */0 || $address != */* ]]; then
    echo "error: SSH is opened to one address or network, such as 203.0.113.7/32, got $address" >&2
    exit 2
fi
region=${zone%-*}
here=$(cd "$(dirname "$0")" && pwd)
export CLOUDSDK_CORE_PROJECT=$project CLOUDSDK_CORE_DISABLE_PROMPTS=1
umask 077

# The token of the cluster.
token=~/.softseg/gcp/auth_token
mkdir -p "$(dirname "$token")"
[[ -s $token ]] || head -c 32 /dev/urandom | base64 | tr -d '+/=\n' > "$token"

# Runs and stores.
gcloud storage buckets describe "gs://$bucket" > /dev/null 2>&1 || gcloud storage buckets create "gs://$bucket" \
    --location "$region" --uniform-bucket-level-access --public-access-prevention >&2

# Workers may use the bucket and pull the image; the head may also start and stop workers.
for account in softseg-head softseg-worker; do
    email=$account@$project.iam.gserviceaccount.com
    gcloud iam service-accounts describe "$email" > /dev/null 2>&1 || gcloud iam service-accounts create "$account" >&2
    gcloud storage buckets add-iam-policy-binding "gs://$bucket" --member "serviceAccount:$email" \
        --role roles/storage.objectAdmin > /dev/null
    gcloud projects add-iam-policy-binding "$project" --member "serviceAccount:$email" --condition None \
        --role roles/artifactregistry.reader > /dev/null
done
head=serviceAccount:softseg-head@$project.iam.gserviceaccount.com
gcloud projects add-iam-policy-binding "$project" --member "$head" --condition None \
    --role roles/compute.instanceAdmin.v1 > /dev/null
gcloud iam service-accounts add-iam-policy-binding "softseg-worker@$project.iam.gserviceaccount.com" --member "$head" \
    --role roles/iam.serviceAccountUser > /dev/null

# A network of its own: everything between the nodes, SSH from one address, nothing else.
if ! gcloud compute networks describe softseg > /dev/null 2>&1; then
    gcloud compute networks create softseg --subnet-mode custom >&2
    gcloud compute firewall-rules create softseg-inside --network softseg --source-ranges 10.0.0.0/20 --allow all >&2
fi
gcloud compute networks subnets describe softseg --region "$region" > /dev/null 2>&1 ||
    gcloud compute networks subnets create softseg --network softseg --region "$region" --range 10.0.0.0/20 >&2
if gcloud compute firewall-rules describe softseg-ssh > /dev/null 2>&1; then
    gcloud compute firewall-rules update softseg-ssh --source-ranges "$address" >&2
else
    gcloud compute firewall-rules create softseg-ssh --network softseg --source-ranges "$address" --allow tcp:22 >&2
fi

# Ubuntu with Docker and NVIDIA's container toolkit, as Google keeps it, from a family whose name ends with the branch of its driver:
# 580 or newer, which the CUDA of the pinned PyTorch needs.
image=$(gcloud compute images list --project deeplearning-platform-release --sort-by ~creationTimestamp --limit 1 \
    --filter 'family ~ "^common-cu[0-9]+-ubuntu-2204-nvidia-(5[89][0-9]|[6-9][0-9][0-9])$"' --format 'value(selfLink.scope(v1))')
if [[ -z $image ]]; then
    echo "error: found no image with NVIDIA driver 580; see: gcloud compute images list --project deeplearning-platform-release" >&2
    exit 1
fi

sed -e "s|FILL_IN_PROJECT|$project|g" -e "s|FILL_IN_REGION|$region|g" -e "s|FILL_IN_ZONE|$zone|g" \
    -e "s|FILL_IN_REGISTRY|$registry|g" -e "s|FILL_IN_IMAGE|$image|g" "$here/cluster.yaml"

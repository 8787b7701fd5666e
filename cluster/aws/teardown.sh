#!/usr/bin/env bash
# Remove what aws/prepare.sh has made, after `ray down`. The bucket stays: it holds the results.
#
#   cluster/aws/teardown.sh REGION
set -euo pipefail

if [[ $# -ne 1 ]]; then
    echo "usage: $0 REGION" >&2
    exit 2
fi
export AWS_DEFAULT_REGION=$1 AWS_PAGER=

running=$(aws ec2 describe-instances --output text --query 'Reservations[].Instances[].InstanceId' --filters \
    Name=tag:ray-cluster-name,Values=softseg Name=instance-state-name,Values=pending,running,stopping,stopped)
if [[ -n $running ]]; then
    echo "error: machines of the cluster are still there ($running); run: ray down my-cluster.yaml" >&2
    exit 1
fi
group=$(aws ec2 describe-security-groups --filters Name=group-name,Values=softseg \
    --query 'SecurityGroups[0].GroupId' --output text)
[[ $group == None ]] || aws ec2 delete-security-group --group-id "$group" > /dev/null
for role in softseg-head softseg-worker; do
    aws iam get-role --role-name "$role" > /dev/null 2>&1 || continue
    aws iam remove-role-from-instance-profile --instance-profile-name "$role" --role-name "$role"
    aws iam delete-instance-profile --instance-profile-name "$role"
    for policy in $(aws iam list-role-policies --role-name "$role" --query 'PolicyNames[]' --output text); do
        aws iam delete-role-policy --role-name "$role" --policy-name "$policy"
    done
    aws iam delete-role --role-name "$role"
done
rm -f ~/.softseg/aws/auth_token
echo "Removed. Left: the bucket with your runs, and the SSH key pair that Ray made (ray-autoscaler_*)."

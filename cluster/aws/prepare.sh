#!/usr/bin/env bash
# Make what aws/cluster.yaml needs, once, and write a copy of it that `ray up` can use. Running it again changes nothing
# but the address that may use SSH.
#
#   cluster/aws/prepare.sh REGION BUCKET REGISTRY MY_ADDRESS/32 > my-cluster.yaml
#
# REGISTRY/softseg:<Ray version> is the image made from cluster/Dockerfile. MY_ADDRESS is yours, as the internet sees it.
set -euo pipefail

if [[ $# -ne 4 ]]; then
    echo "usage: $0 REGION BUCKET REGISTRY MY_ADDRESS/32" >&2
    exit 2
fi
region=$1 bucket=$2 registry=$3 address=$4
if [[ $address == */0 || $address != */* ]]; then
    echo "error: SSH is opened to one address or network, such as 203.0.113.7/32, got $address" >&2
    exit 2
fi
here=$(cd "$(dirname "$0")" && pwd)
export AWS_DEFAULT_REGION=$region AWS_PAGER=
account=$(aws sts get-caller-identity --query Account --output text)
umask 077

fill_in() {
    sed -e "s|FILL_IN_REGION|$region|g" -e "s|FILL_IN_BUCKET|$bucket|g" -e "s|FILL_IN_REGISTRY|$registry|g" \
        -e "s|FILL_IN_ACCOUNT|$account|g" -e "s|FILL_IN_AMI|${image:-}|g" -e "s|FILL_IN_SECURITY_GROUP|${group:-}|g" "$1"
}

# The token of the cluster.
token=~/.softseg/aws/auth_token
mkdir -p "$(dirname "$token")"
[[ -s $token ]] || head -c 32 /dev/urandom | base64 | tr -d '+/=\n' > "$token"

# Runs and stores.
aws s3api head-bucket --bucket "$bucket" 2> /dev/null || aws s3 mb "s3://$bucket" >&2
aws s3api put-public-access-block --bucket "$bucket" --public-access-block-configuration \
    BlockPublicAcls=true,IgnorePublicAcls=true,BlockPublicPolicy=true,RestrictPublicBuckets=true

# Everything between the nodes, SSH from one address, nothing else. (Ray's own default would open SSH to all.)
vpc=$(aws ec2 describe-vpcs --filters Name=is-default,Values=true --query 'Vpcs[0].VpcId' --output text)
group=$(aws ec2 describe-security-groups --filters Name=group-name,Values=softseg "Name=vpc-id,Values=$vpc" \
    --query 'SecurityGroups[0].GroupId' --output text)
if [[ $group == None ]]; then
    group=$(aws ec2 create-security-group --group-name softseg --vpc-id "$vpc" --query GroupId --output text \
        --description "softseg: SSH from one address, everything between the nodes")
    aws ec2 authorize-security-group-ingress --group-id "$group" --protocol=-1 --source-group "$group" > /dev/null
fi
# shellcheck disable=SC2016 # the backquotes belong to the query
old=$(aws ec2 describe-security-groups --group-ids "$group" --output text \
    --query 'SecurityGroups[0].IpPermissions[?FromPort==`22`].IpRanges[].CidrIp')
for known in $old; do
    aws ec2 revoke-security-group-ingress --group-id "$group" --protocol tcp --port 22 --cidr "$known" > /dev/null
done
aws ec2 authorize-security-group-ingress --group-id "$group" --protocol tcp --port 22 --cidr "$address" > /dev/null

# Workers may use the bucket and pull the image; the head may also start workers of the listed types, and stop them.
trust='{"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "sts:AssumeRole",
        "Principal": {"Service": "ec2.amazonaws.com"}}]}'
for role in softseg-head softseg-worker; do
    if ! aws iam get-role --role-name "$role" > /dev/null 2>&1; then
        aws iam create-role --role-name "$role" --assume-role-policy-document "$trust" > /dev/null
        aws iam create-instance-profile --instance-profile-name "$role" > /dev/null
        aws iam add-role-to-instance-profile --instance-profile-name "$role" --role-name "$role"
    fi
    aws iam put-role-policy --role-name "$role" --policy-name storage --policy-document "$(fill_in "$here/worker-policy.json")"
done
aws iam put-role-policy --role-name softseg-head --policy-name workers --policy-document "$(fill_in "$here/head-policy.json")"

# Ubuntu with Docker, the NVIDIA driver and its container toolkit, as AWS keeps it.
image=$(aws ssm get-parameter --query Parameter.Value --output text --name \
    /aws/service/deeplearning/ami/x86_64/base-oss-nvidia-driver-gpu-ubuntu-22.04/latest/ami-id)

fill_in "$here/cluster.yaml"

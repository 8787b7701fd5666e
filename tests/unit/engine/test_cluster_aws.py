"""What the head of the AWS cluster may do: every call that Ray's own node provider makes for a worker, and nothing beyond.

No account is used: the calls of Ray's node provider are answered here, and a few lines read the policy as IAM does.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.aws import node_provider
from ray.autoscaler.tags import (
    STATUS_UP_TO_DATE,
    TAG_RAY_FILE_MOUNTS_CONTENTS,
    TAG_RAY_NODE_NAME,
    TAG_RAY_NODE_STATUS,
    TAG_RAY_RUNTIME_CONFIG,
    TAG_RAY_USER_NODE_TYPE,
)

AWS = Path(__file__).parents[3] / "cluster/aws"
FILLED = {
    "REGION": "eu-west-1",
    "ACCOUNT": "123456789012",
    "SECURITY_GROUP": "sg-1",
    "AMI": "ami-1",
    "REGISTRY": "r",
    "BUCKET": "b",
}
EC2 = "arn:aws:ec2:eu-west-1:123456789012:"
OURS = {"ec2:ResourceTag/ray-cluster-name": "softseg"}
Request = tuple[str, str, dict[str, Any]]  # an action, the resource, and the keys for conditions


def filled(name: str) -> str:
    text = (AWS / name).read_text()
    for key, value in FILLED.items():
        text = text.replace(f"FILL_IN_{key}", value)
    assert "FILL_IN_" not in text
    return text


POLICY = json.loads(filled("head-policy.json"))
CONFIG = yaml.safe_load(filled("cluster.yaml"))
WORKERS = {name: node for name, node in CONFIG["available_node_types"].items() if name != CONFIG["head_node_type"]}


def words(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def holds(operator: str, wanted: Any, got: Any) -> bool:
    """One condition. A key that is missing from the request is equal to nothing; `ForAllValues` asks it of every value."""
    if operator == "ForAllValues:StringEquals":
        return all(value in words(wanted) for value in words(got or []))
    assert operator == "StringEquals"
    return got in words(wanted)


def allowed(action: str, resource: str, keys: dict[str, Any]) -> bool:
    """Whether a statement of the head's policy allows a request; no statement denies one."""
    return any(
        action in words(statement["Action"])
        and any(fnmatchcase(resource, pattern) for pattern in words(statement["Resource"]))
        and all(
            holds(operator, wanted, keys.get(key))
            for operator, conditions in statement.get("Condition", {}).items()
            for key, wanted in conditions.items()
        )
        for statement in POLICY["Statement"]
    )


class Calls:
    """EC2 for the node provider: it takes down every call and answers with machines that carry the tags of their launch."""

    def __init__(self) -> None:
        self.made: list[tuple[str, dict[str, Any]]] = []
        self.machines: list[dict[str, Any]] = []

    def __call__(self, params: dict[str, Any], model: Any, **_: Any) -> tuple[Any, dict[str, Any]]:
        self.made.append((model.name, self.asked))
        answer: dict[str, Any] = {"Reservations": [{"Instances": self.machines}]}
        if model.name == "RunInstances":
            [spec] = self.asked["TagSpecifications"]
            name = f"i-{len(self.machines)}"
            machine = {"InstanceId": name, "State": {"Name": "running"}, "Tags": spec["Tags"], "StateReason": {"Message": ""}}
            self.machines.append(machine)
            answer = {"Instances": [machine]}
        return SimpleNamespace(status_code=200), answer

    def remember(self, params: dict[str, Any], **_: Any) -> None:
        self.asked = params


@pytest.fixture(scope="module")
def calls() -> Iterator[Calls]:
    """The calls of Ray's node provider from the launch of a worker of each kind to its end."""
    calls = Calls()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(node_provider, "TAG_BATCH_DELAY", 0)
        provider = node_provider.AWSNodeProvider(CONFIG["provider"], CONFIG["cluster_name"])
        for resource in (provider.ec2, provider.ec2_fail_fast):
            resource.meta.client.meta.events.register("provide-client-params.ec2", calls.remember)
            resource.meta.client.meta.events.register("before-call.ec2", calls)
        for name, node in WORKERS.items():
            config = node["node_config"] | {"SubnetIds": ["subnet-1"], "KeyName": "key"}  # as `ray up` adds them
            provider.create_node(config, {TAG_RAY_NODE_NAME: name, TAG_RAY_USER_NODE_TYPE: name}, 1)
        for machine in provider.non_terminated_nodes({}):
            provider.set_node_tags(machine, {TAG_RAY_NODE_STATUS: STATUS_UP_TO_DATE, TAG_RAY_RUNTIME_CONFIG: "a"})
            provider.set_node_tags(machine, {TAG_RAY_FILE_MOUNTS_CONTENTS: "b"})
        provider.terminate_nodes([machine["InstanceId"] for machine in calls.machines])
    yield calls
    node_provider.resource_cache.cache_clear()  # the next provider gets clients without our answers


def requests(calls: Calls) -> Iterator[Request]:
    """What IAM is asked about the calls."""
    for name, asked in calls.made:
        if name == "RunInstances":
            [spec] = asked["TagSpecifications"]
            tags = {f"aws:RequestTag/{tag['Key']}": tag["Value"] for tag in spec["Tags"]}
            yield "ec2:RunInstances", f"{EC2}instance/*", tags | {"ec2:InstanceType": asked["InstanceType"]}
            yield "ec2:RunInstances", f"arn:aws:ec2:eu-west-1::image/{asked['ImageId']}", {}
            for kind in ("network-interface/*", "volume/*", f"subnet/{asked['SubnetId']}", f"key-pair/{asked['KeyName']}"):
                yield "ec2:RunInstances", EC2 + kind, {}
            for group in asked["SecurityGroupIds"]:
                yield "ec2:RunInstances", f"{EC2}security-group/{group}", {}
            if asked["InstanceMarketOptions"]["MarketType"] == "spot":
                yield "ec2:RunInstances", f"{EC2}spot-instances-request/*", {}
            keys = {"ec2:CreateAction": "RunInstances", "aws:TagKeys": [tag["Key"] for tag in spec["Tags"]]}
            yield "ec2:CreateTags", f"{EC2}{spec['ResourceType']}/*", tags | keys
            role = f"arn:aws:iam::123456789012:role/{asked['IamInstanceProfile']['Name']}"
            yield "iam:PassRole", role, {"iam:PassedToService": "ec2.amazonaws.com"}
        elif name == "CreateTags":
            keys = {"aws:TagKeys": [tag["Key"] for tag in asked["Tags"]]}
            yield from ((f"ec2:{name}", f"{EC2}instance/{machine}", OURS | keys) for machine in asked["Resources"])
        elif name == "TerminateInstances":
            yield from ((f"ec2:{name}", f"{EC2}instance/{machine}", OURS) for machine in asked["InstanceIds"])
        else:
            yield f"ec2:{name}", "*", {}


def test_the_head_may_do_what_rays_node_provider_does_for_every_kind_of_worker(calls: Calls) -> None:
    launched = [asked["InstanceType"] for name, asked in calls.made if name == "RunInstances"]
    assert launched == [node["node_config"]["InstanceType"] for node in WORKERS.values()]
    asked = list(requests(calls))
    assert {action for action, _, _ in asked} == {
        *("ec2:RunInstances", "ec2:CreateTags", "ec2:DescribeInstances", "ec2:TerminateInstances", "iam:PassRole")
    }
    assert [request for request in asked if not allowed(*request)] == []


def test_the_head_may_launch_the_types_of_the_launcher_file_and_no_other() -> None:
    types = {node["node_config"]["InstanceType"] for node in WORKERS.values()}
    [statement] = [s for s in POLICY["Statement"] if "ec2:InstanceType" in s.get("Condition", {}).get("StringEquals", {})]
    assert set(statement["Condition"]["StringEquals"]["ec2:InstanceType"]) == types
    head = CONFIG["available_node_types"][CONFIG["head_node_type"]]["node_config"]
    assert head["InstanceType"] not in types  # it is launched by `ray up`, with your own rights


TAGGED = {"ec2:InstanceType": "g6.2xlarge", "aws:RequestTag/ray-cluster-name": "softseg"}
STATUS = {"aws:TagKeys": ["ray-node-status"]}


@pytest.mark.parametrize(
    ("action", "resource", "keys"),
    [
        ("ec2:RunInstances", "instance/*", TAGGED | {"ec2:InstanceType": "p5.48xlarge"}),
        ("ec2:RunInstances", "instance/*", TAGGED | {"ec2:InstanceType": "m7i.xlarge"}),
        ("ec2:RunInstances", "instance/*", {"ec2:InstanceType": "g6.2xlarge"}),
        ("ec2:RunInstances", "instance/*", TAGGED | {"aws:RequestTag/ray-cluster-name": "another"}),
        ("ec2:RunInstances", "security-group/sg-of-another", {}),
        ("ec2:RunInstances", "launch-template/lt-1", {}),
        ("ec2:RunInstances", "arn:aws:ec2:us-east-1:123456789012:instance/*", TAGGED),
        ("ec2:CreateTags", "instance/i-of-another", STATUS),
        ("ec2:CreateTags", "instance/i-of-another", {"aws:TagKeys": ["ray-cluster-name"]}),
        ("ec2:CreateTags", "instance/i-1", OURS | {"aws:TagKeys": ["ray-cluster-name"]}),
        ("ec2:CreateTags", "instance/i-1", OURS | {"aws:TagKeys": ["ray-node-status", "Owner"]}),
        ("ec2:CreateTags", "instance/i-1", STATUS | {"ec2:CreateAction": "StartInstances"}),
        ("ec2:CreateTags", "volume/vol-1", {"ec2:CreateAction": "CreateVolume"}),
        ("ec2:CreateTags", "security-group/sg-1", {"ec2:CreateAction": "RunInstances"}),
        ("ec2:TerminateInstances", "instance/i-of-another", {}),
        ("ec2:TerminateInstances", "instance/i-of-another", {"ec2:ResourceTag/ray-cluster-name": "another"}),
        ("iam:PassRole", "arn:aws:iam::123456789012:role/softseg-head", {"iam:PassedToService": "ec2.amazonaws.com"}),
        ("iam:PassRole", "arn:aws:iam::123456789012:role/softseg-worker", {"iam:PassedToService": "lambda.amazonaws.com"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_head_may_not(action: str, resource: str, keys: dict[str, Any]) -> None:
    assert not allowed(action, resource if resource.startswith("arn:") else EC2 + resource, keys)


def test_a_statement_that_changes_something_names_region_and_account() -> None:
    assert len({statement["Sid"] for statement in POLICY["Statement"]}) == len(POLICY["Statement"])
    for statement in POLICY["Statement"]:
        if statement["Sid"] != "SeeWhatThereIs":
            for resource in words(statement["Resource"]):
                assert resource.startswith((EC2, "arn:aws:ec2:eu-west-1::image/", "arn:aws:iam::123456789012:role/")), resource


def test_a_worker_may_use_the_bucket_and_pull_images_and_nothing_else() -> None:
    rights = {
        (action, r)
        for s in json.loads(filled("worker-policy.json"))["Statement"]
        for action in words(s["Action"])
        for r in words(s["Resource"])
    }
    bucket = {("s3:ListBucket", "arn:aws:s3:::b"), ("s3:GetBucketLocation", "arn:aws:s3:::b")}
    objects = {(f"s3:{verb}", "arn:aws:s3:::b/*") for verb in ("GetObject", "PutObject", "DeleteObject", "AbortMultipartUpload")}
    pulls = ("GetAuthorizationToken", "BatchCheckLayerAvailability", "BatchGetImage", "GetDownloadUrlForLayer")
    assert rights == bucket | objects | {(f"ecr:{verb}", "*") for verb in pulls}

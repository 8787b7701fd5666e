"""The files of cluster/ are what Ray, Kubernetes, the shell and our own rules for security take, as far as can be known offline."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from copy import deepcopy
from fnmatch import fnmatch
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from kubernetes_schema import KINDS
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.scripts import start

ROOT = Path(__file__).parents[3]
CLUSTER = ROOT / "cluster"
FILES = sorted(path for path in CLUSTER.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
CLOUDS = ("aws", "gcp")
MANIFESTS = [
    (path, document)
    for path in (*sorted(CLUSTER.glob("kuberay/*.yaml")), CLUSTER / "mlflow/kubernetes.yaml")
    for document in yaml.safe_load_all(path.read_text())
]
SCRIPTS = [path for path in FILES if path.suffix in (".sh", ".sbatch")]
LOCK = dict(line.split("==") for line in (ROOT / "requirements.lock").read_text().split())


def name_of(path: Path) -> str:
    return str(path.relative_to(CLUSTER))


def launcher(cloud: str) -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load((CLUSTER / cloud / "cluster.yaml").read_text())
    return config


def workers(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {name: node for name, node in config["available_node_types"].items() if name != config["head_node_type"]}


def ray_clusters() -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Every RayCluster, as metadata and spec: on its own, or inside a RayJob."""
    for _, document in MANIFESTS:
        if document["kind"] in ("RayCluster", "RayJob"):
            yield document["metadata"], document["spec"].get("rayClusterSpec", document["spec"])


def pods() -> Iterator[tuple[str, dict[str, Any]]]:
    """Every pod template of the manifests, with where it is."""

    def inside(value: Any, place: str) -> Iterator[tuple[str, dict[str, Any]]]:
        if isinstance(value, dict):
            if "containers" in value:
                yield place, value
            for key, part in value.items():
                yield from inside(part, f"{place}.{key}")
        elif isinstance(value, list):
            for index, part in enumerate(value):
                yield from inside(part, f"{place}[{index}]")

    for path, document in MANIFESTS:
        yield from inside(document, f"{name_of(path)}:{document['kind']}")


PODS = dict(pods())


def images() -> Iterator[tuple[str, str]]:
    """Every image that a file names, with the file."""
    for path in FILES:
        for found in re.findall(r"(?:image: |^FROM |docker (?:build|push) .*?)([\w./-]+:[\w.-]+)", path.read_text(), re.M):
            yield name_of(path), found


# ---- the launcher of Ray clusters: aws/, gcp/


@pytest.mark.parametrize("cloud", CLOUDS)
def test_ray_accepts_the_launcher_file(cloud: str) -> None:
    prepared = prepare_config(launcher(cloud))
    validate_config(prepared)
    assert all("max_workers" in node for node in prepared["available_node_types"].values())


@pytest.mark.parametrize("cloud", CLOUDS)
def test_the_head_is_on_demand_without_work_and_workers_are_spot_from_zero(cloud: str) -> None:
    config = launcher(cloud)
    head = config["available_node_types"][config["head_node_type"]]
    assert head["resources"] == {"CPU": 0}
    spot = {"aws": ("InstanceMarketOptions", "MarketType", "spot"), "gcp": ("scheduling", "provisioningModel", "SPOT")}
    section, field, value = spot[cloud]
    assert section not in head["node_config"]
    assert any(node["resources"].get("GPU") for node in workers(config).values())
    for node in workers(config).values():
        assert node["min_workers"] == 0
        assert node["node_config"][section][field] == value


def test_machines_on_aws_have_roles_one_group_and_imdsv2_only() -> None:
    config = launcher("aws")
    profiles = {name: n["node_config"]["IamInstanceProfile"]["Name"] for name, n in config["available_node_types"].items()}
    assert profiles.pop("head") == "softseg-head"
    assert set(profiles.values()) == {"softseg-worker"}
    for node in config["available_node_types"].values():
        assert node["node_config"]["SecurityGroupIds"] == ["FILL_IN_SECURITY_GROUP"]  # else Ray opens SSH to everybody
        assert node["node_config"]["MetadataOptions"]["HttpTokens"] == "required"
        assert node["node_config"]["MetadataOptions"]["HttpPutResponseHopLimit"] == 1


def test_machines_on_google_have_accounts_and_a_network_of_their_own() -> None:
    config = launcher("gcp")
    for name, node in config["available_node_types"].items():
        [account] = node["node_config"]["serviceAccounts"]
        assert account["email"].startswith("softseg-head@" if name == "head" else "softseg-worker@")
        assert all(net["subnetwork"].endswith("/softseg") for net in node["node_config"]["networkInterfaces"])


@pytest.mark.parametrize("policy", ["aws/head-policy.json", "aws/worker-policy.json"])
def test_a_policy_allows_nothing_by_wildcard(policy: str) -> None:
    for statement in json.loads((CLUSTER / policy).read_text())["Statement"]:
        actions = [statement["Action"]] if isinstance(statement["Action"], str) else statement["Action"]
        assert not [action for action in actions if "*" in action]
        if any(not re.match(r"(ec2:Describe|ecr:)", action) for action in actions):
            assert statement["Resource"] != "*" or "Condition" in statement, statement["Sid"]


@pytest.mark.parametrize("cloud", CLOUDS)
def test_start_commands_are_rays_with_the_dashboard_on_loopback(cloud: str) -> None:
    config = launcher(cloud)
    heads = [parse_start(command) for command in config["head_start_ray_commands"] if "ray start" in command]
    others = [parse_start(command) for command in config["worker_start_ray_commands"] if "ray start" in command]
    assert [(h["head"], h["port"], h["dashboard_host"], h["num_cpus"]) for h in heads] == [(True, 6379, "127.0.0.1", 0)]
    assert [w["address"] for w in others] == ["$RAY_HEAD_IP:6379"]


def parse_start(command: str) -> dict[str, Any]:
    """The options of a `ray start`, by Ray's own parser; it refuses what it does not know."""
    words = shlex.split(command)
    parameters: dict[str, Any] = start.make_context("start", words[words.index("start") + 1 :]).params
    return parameters


@pytest.mark.parametrize("cloud", CLOUDS)
def test_prepare_fills_in_every_blank(cloud: str) -> None:
    files = (path for path in (CLUSTER / cloud).iterdir() if path.suffix in (".yaml", ".json"))
    blanks = {blank for path in files for blank in re.findall(r"FILL_IN_[A-Z_]+", path.read_text())}
    filled = set(re.findall(r"s\|(FILL_IN_[A-Z_]+)\|", (CLUSTER / cloud / "prepare.sh").read_text()))
    assert blanks == filled


# ---- Kubernetes: kuberay/, mlflow/kubernetes.yaml


@pytest.mark.parametrize(("path", "document"), MANIFESTS, ids=lambda v: name_of(v) if isinstance(v, Path) else v["kind"])
def test_a_manifest_fits_its_schema(path: Path, document: dict[str, Any]) -> None:
    jsonschema.validate(document, KINDS[document["kind"]])


def test_ray_derives_an_autoscaler_that_starts_gpu_workers_from_zero() -> None:
    clusters = list(ray_clusters())
    assert len(clusters) == 2
    for metadata, spec in clusters:
        derived = _derive_autoscaling_config_from_ray_cr({"metadata": metadata, "spec": spec})
        types = derived["available_node_types"]
        assert types["headgroup"]["resources"]["CPU"] == 0
        assert types["gpu"]["resources"] == {"CPU": 8, "GPU": 1, "memory": 32 * 2**30}
        assert (types["gpu"]["min_workers"], types["gpu"]["max_workers"]) == (0, 8)
        assert spec["autoscalerOptions"]["version"] == "v2"


def test_a_ray_cluster_has_token_authentication_and_the_pinned_version() -> None:
    for _, spec in ray_clusters():
        assert spec["authOptions"]["mode"] == "token"
        assert spec["rayVersion"] == LOCK["ray"]


def test_the_job_has_the_cluster_of_the_cluster_file() -> None:
    (_, cluster), (_, job) = deepcopy(list(ray_clusters()))
    assert cluster.pop("gcsFaultToleranceOptions")["redisAddress"] == "redis:6379"
    head = job["headGroupSpec"]["template"]["spec"]
    head["volumes"] = [volume for volume in head["volumes"] if volume["name"] != "study"]
    for container in head["containers"]:
        container["volumeMounts"] = [mount for mount in container["volumeMounts"] if mount["name"] != "study"]
    assert job == cluster


def test_a_study_with_failed_fits_starts_no_second_cluster() -> None:
    [job] = [document["spec"] for _, document in MANIFESTS if document["kind"] == "RayJob"]
    assert job["backoffLimit"] == 0  # a retry of a RayJob is a whole new cluster, and exit code 1 means "some fits failed"
    assert job["submissionMode"] == "K8sJobMode"  # its submitter looks for the job before it submits, so that it may be retried
    assert job["submitterConfig"] == {"backoffLimit": 2}
    assert job["submitterPodTemplate"]["spec"]["restartPolicy"] == "Never"


POLICIES = [(path, document) for path, document in MANIFESTS if document["kind"] == "NetworkPolicy"]
RAY, HEAD, WORKER = {"app.kubernetes.io/name": "softseg"}, {"ray.io/node-type": "head"}, {"ray.io/node-type": "worker"}
MLFLOW = {"app.kubernetes.io/name": "softseg-mlflow"}
METADATA, ROLES, API, BUCKET = "169.254.169.254", "169.254.170.23", "10.96.0.1", "52.216.0.1"


def leaves(pod: dict[str, str], to: str, port: int, protocol: str = "TCP", on_gke: bool = False) -> bool:
    """Whether a pod of the namespace reaches an address, or the pods of a namespace, as Kubernetes reads the policies."""

    def is_peer(peer: dict[str, Any]) -> bool:
        if "ipBlock" in peer:
            nets = [ip_network(net) for net in (peer["ipBlock"]["cidr"], *peer["ipBlock"].get("except", ()))]
            return to[0].isdigit() and ip_address(to) in nets[0] and not any(ip_address(to) in net for net in nets[1:])
        return to == peer.get("namespaceSelector", {}).get("matchLabels", {}).get("kubernetes.io/metadata.name", "softseg")

    rules = [
        rule
        for path, policy in POLICIES
        if (on_gke or path.name != "gke-identity.yaml") and "Egress" in policy["spec"]["policyTypes"]
        if policy["spec"]["podSelector"].get("matchLabels", {}).items() <= pod.items()
        for rule in policy["spec"]["egress"]
    ]
    assert rules, "no policy selects the pod, so that it reaches everything"
    return any(
        any(is_peer(peer) for peer in rule["to"]) and ("ports" not in rule or {"protocol": protocol, "port": port} in rule["ports"])
        for rule in rules
    )


@pytest.mark.parametrize("pod", [RAY | HEAD, RAY | WORKER, MLFLOW, {}], ids=["head", "worker", "mlflow", "submitter"])
def test_a_pod_reaches_its_namespace_names_and_public_buckets_and_no_metadata(pod: dict[str, str]) -> None:
    assert leaves(pod, "softseg", 6379)
    assert leaves(pod, "kube-system", 53, "UDP")
    assert leaves(pod, "kube-system", 53)
    assert leaves(pod, BUCKET, 443)
    refused = [("kube-system", 443), ("default", 443), ("default", 53), (BUCKET, 80), (BUCKET, 22), (API, 10250), (API, 80)]
    refused += [(address, port) for address in (METADATA, ROLES, "169.254.169.252") for port in (80, 443, 988, 6443, 5432)]
    assert not [(to, port) for to, port in refused if leaves(pod, to, port)]


@pytest.mark.parametrize("private", [API, "172.16.0.1", "192.168.1.1", "100.64.0.1"])
def test_only_the_head_reaches_the_api_server_and_only_mlflow_a_database(private: str) -> None:
    for pod in (RAY | WORKER, MLFLOW, {}):
        assert not leaves(pod, private, 443)
        assert not leaves(pod, private, 6443)
    assert leaves(RAY | HEAD, private, 443)
    assert leaves(RAY | HEAD, private, 6443)
    assert leaves(MLFLOW, private, 5432)
    assert not leaves(RAY | HEAD, private, 5432)


def test_the_metadata_of_gke_is_reached_only_where_its_policy_is_applied() -> None:
    served = {(METADATA, 80), (METADATA, 8080), ("169.254.169.252", 987), ("169.254.169.252", 988)}
    assert not [to for to in served if leaves(RAY | WORKER, *to)]
    assert all(leaves(RAY | WORKER, *to, on_gke=True) for to in served)
    assert not leaves(RAY | WORKER, METADATA, 443, on_gke=True)


def test_only_the_namespace_and_the_operator_come_in() -> None:
    [(path, inside)] = [(path, policy["spec"]) for path, policy in POLICIES if "Ingress" in policy["spec"]["policyTypes"]]
    assert name_of(path) == "kuberay/namespace.yaml"
    operator = {"namespaceSelector": {}, "podSelector": {"matchLabels": {"app.kubernetes.io/name": "kuberay-operator"}}}
    assert inside["podSelector"] == {}
    assert inside["ingress"] == [{"from": [{"podSelector": {}}, operator]}]


@pytest.mark.parametrize("place", PODS)
def test_a_pod_is_without_rights_and_gets_what_it_asks_for(place: str) -> None:
    spec = PODS[place]
    assert spec["securityContext"]["runAsNonRoot"]
    assert spec["securityContext"]["runAsUser"] > 0
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    volumes = {volume["name"] for volume in spec.get("volumes", ())}
    for container in spec["containers"]:
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        assert container["resources"]["requests"] == container["resources"]["limits"]
        assert {mount["name"] for mount in container.get("volumeMounts", ())} <= volumes | {"data"}


def test_a_pod_of_ray_has_shared_memory_and_time_to_drain() -> None:
    for _, spec in ray_clusters():
        for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
            pod = group["template"]["spec"]
            [shm] = [volume["emptyDir"] for volume in pod["volumes"] if volume["name"] == "shm"]
            assert shm["medium"] == "Memory"
            assert {"name": "shm", "mountPath": "/dev/shm"} in pod["containers"][0]["volumeMounts"]
            assert pod["terminationGracePeriodSeconds"] == 120
        for group in spec["workerGroupSpecs"]:
            *_, seconds = group["template"]["spec"]["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
            assert float(seconds) < 120


# ---- MLflow, images, scripts


def test_compose_publishes_on_loopback_only_and_asks_for_every_password() -> None:
    compose = yaml.safe_load((CLUSTER / "mlflow/compose.yaml").read_text())
    published = [port for service in compose["services"].values() for port in service.get("ports", ())]
    assert published
    assert all(str(port).startswith("127.0.0.1:") for port in published)
    assert {name for s in compose["services"].values() for name in s.get("depends_on", {})} <= set(compose["services"])
    volumes = [v.split(":")[0] for s in compose["services"].values() for v in s.get("volumes", ())]
    assert set(volumes) == set(compose["volumes"])
    settings = {k: v for service in compose["services"].values() for k, v in service["environment"].items()}
    needed = {"POSTGRES_PASSWORD", "MLFLOW_DATABASE", "MLFLOW_AUTH_ADMIN_PASSWORD", "MLFLOW_FLASK_SERVER_SECRET_KEY"}
    assert all(":?" in settings[name] for name in needed)  # compose refuses to start without it
    start_script = (CLUSTER / "mlflow/start.sh").read_text()
    for name in re.findall(r"\$\{(MLFLOW_\w+):\?", start_script):
        assert name in settings


def test_image_tags_are_the_pinned_versions() -> None:
    found = list(images())
    assert {file for file, _ in found} >= {"Dockerfile", "aws/cluster.yaml", "gcp/cluster.yaml", "kuberay/rayjob.yaml"}
    for file, image in found:
        name, tag = image.rsplit("/", 1)[-1].split(":")
        expected = {"ray": f"{LOCK['ray']}-py311-gpu", "softseg": LOCK["ray"], "softseg-mlflow": LOCK["mlflow"]}
        assert tag == expected.get(name, tag), f"{file}: {image}"
        assert re.match(r"\d+\.\d+", tag) or name == "python", f"{file}: {image} is not a version"
        assert "ray-ml" not in image


@pytest.mark.parametrize("file", ["Dockerfile", "mlflow/Dockerfile"])
def test_an_image_ends_as_a_user_without_rights_and_has_the_locked_versions(file: str) -> None:
    text = (CLUSTER / file).read_text()
    assert re.findall(r"^USER (\w+)", text, re.M)[-1] != "root"
    asserted = re.findall(r"(?:__version__ == '|mlflow\[auth\]==)([\d.]+)", text)
    assert asserted == [LOCK["ray"] if file == "Dockerfile" else LOCK["mlflow"]]
    for source in re.findall(r"^COPY (?:--chown=\w+ )?(.+) \S+$", text, re.M):
        base = ROOT if file == "Dockerfile" else CLUSTER / "mlflow"
        assert all((base / word).exists() for word in source.split()), source


@pytest.mark.parametrize("path", SCRIPTS, ids=name_of)
def test_shellcheck_finds_nothing_in_a_script(path: Path) -> None:
    shellcheck = Path(sys.executable).parent / "shellcheck"
    done = subprocess.run([shellcheck, "--severity=style", path], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert path.stat().st_mode & 0o100, "not executable"


# ---- rules for all files


@pytest.mark.parametrize("path", [p for p in FILES if p.name != "README.md"], ids=name_of)
def test_nothing_listens_on_all_interfaces_without_authentication(path: Path) -> None:
    text = path.read_text()
    if re.search(r"0\.0\.0\.0(?!/)|--dashboard-host[= ]::", text):
        assert "--app-name basic-auth" in text or re.search(r"authOptions: \{mode: token", text)
    if "ray start" in text or "symmetric-run --" in text:
        assert re.search(r"RAY_AUTH_MODE=token", text), "starts Ray without token authentication"
    outwards = re.sub(r"cidr: 0\.0\.0\.0/0\n +except: ", "", text)  # a rule of egress; what comes in is tested field by field
    assert not re.search(r"0\.0\.0\.0/0", outwards), "opens a port to everybody"
    assert "RAY_AUTH_MODE=disabled" not in text


@pytest.mark.parametrize("path", [*SCRIPTS, *(CLUSTER / c / "cluster.yaml" for c in CLOUDS)], ids=name_of)
def test_no_head_listens_where_workers_do(path: Path) -> None:
    ports = [int(port) for port in re.findall(r"--(?:[a-z-]+-)?port[= ](\d+)", path.read_text())]
    assert not [port for port in ports if 10002 <= port <= 19999]


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_no_file_holds_a_secret(path: Path) -> None:
    text = path.read_text()
    patterns = {
        "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY",
        "a key of AWS": r"\b(AKIA|ASIA)[0-9A-Z]{16}\b",
        "a key of Google": r"\bAIza[0-9A-Za-z_-]{35}\b",
        "a Secret with its content": r"^kind: Secret$",
        "a password": r"(?i)\b(?:password|passwd|secret_key|auth_token)\b[\"']?\s*[:=]\s*[\"']?(?![\"'$<{])[\w+/-]{8,}",
    }
    assert [what for what, pattern in patterns.items() if re.search(pattern, text, re.M)] == []


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_nodes_have_the_settings_of_every_process(path: Path) -> None:
    text = path.read_text()
    if "ray start" in text or "symmetric-run --" in text or "rayVersion:" in text or "rayproject/ray:" in text:
        assert re.search(r"RAY_USAGE_STATS_ENABLED(=0|, value: \"0\")", text)
        assert re.search(r"MALLOC_ARENA_MAX(=1|, value: \"1\")", text)


def test_the_readme_names_every_file_and_only_files_that_exist() -> None:
    text = (CLUSTER / "README.md").read_text()
    named = set(re.findall(r"`(?:cluster/)?((?:[a-z]+/)?[\w.-]+\.(?:yaml|sh|json|py|sbatch)|(?:[a-z]+/)?Dockerfile)`", text))
    ours = {name_of(path) for path in FILES} - {"README.md"}
    assert ours <= named
    assert {name for name in named - ours if not (ROOT / name).exists() and not (ROOT / "tests/unit" / name).exists()} == set()


def test_the_readme_says_of_every_file_what_is_tested_and_what_is_not() -> None:
    _, _, text = (CLUSTER / "README.md").read_text().partition("**Never run**")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| `")]
    assert all(len(row) == 3 and all(row) for row in rows)
    patterns = [pattern for row in rows for pattern in re.findall(r"`([^`]+)`", row[0])]
    for name in (name_of(path) for path in FILES if path.name != "README.md"):
        assert len([pattern for pattern in patterns if fnmatch(name, pattern)]) == 1, name
    assert [pattern for pattern in patterns if not any(fnmatch(name_of(path), pattern) for path in FILES)] == []

"""The part of the schemas of Kubernetes (1.34) and KubeRay (1.6) that the files in cluster/ use, strict about unknown fields.

Kubernetes drops what it does not know, so that a misspelt field is a setting that is silently missing.
"""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]
STRING: Schema = {"type": "string"}
TRUTH: Schema = {"type": "boolean"}
COUNT: Schema = {"type": "integer", "minimum": 0}
PORT: Schema = {"type": "integer", "minimum": 1, "maximum": 65535}
NAME: Schema = {"type": "string", "pattern": r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$"}
QUANTITY: Schema = {"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)?(m|k|Ki|M|Mi|G|Gi|T|Ti)?$"}
QUANTITIES: Schema = {"type": "object", "additionalProperties": QUANTITY}
STRINGS: Schema = {"type": "object", "additionalProperties": STRING}
PULL: Schema = {"enum": ["Always", "IfNotPresent", "Never"]}


def fields(_required: str = "", **properties: Schema) -> Schema:
    """An object with these fields and no others; `_required` names those that must be there."""
    return {"type": "object", "properties": properties, "required": _required.split(), "additionalProperties": False}


def many(item: Schema) -> Schema:
    return {"type": "array", "items": item}


SELECTOR = fields(matchLabels=STRINGS)
RESOURCES = fields("requests limits", requests=QUANTITIES, limits=QUANTITIES)
SECRET_KEY = fields("secretKeyRef", secretKeyRef=fields("name key", name=NAME, key=STRING))
ENVIRONMENT = many(fields("name", name=STRING, value=STRING, valueFrom=SECRET_KEY))
LOCKED = fields(allowPrivilegeEscalation=TRUTH, readOnlyRootFilesystem=TRUTH, capabilities=fields("drop", drop=many(STRING)))
CONTAINER = fields(
    "name image imagePullPolicy resources securityContext",
    name=NAME,
    image=STRING,
    imagePullPolicy=PULL,
    args=many(STRING),
    env=ENVIRONMENT,
    ports=many(fields("containerPort", containerPort=PORT, name={"type": "string", "maxLength": 15})),
    resources=RESOURCES,
    securityContext=LOCKED,
    volumeMounts=many(fields("name mountPath", name=NAME, mountPath=STRING, readOnly=TRUTH)),
    lifecycle=fields(preStop=fields("exec", exec=fields("command", command=many(STRING)))),
    readinessProbe=fields(httpGet=fields("path port", path=STRING, port=PORT), periodSeconds=COUNT),
)
VOLUME = fields(
    "name", name=NAME, emptyDir=fields(medium={"enum": ["", "Memory"]}, sizeLimit=QUANTITY), configMap=fields("name", name=NAME)
)
POD_SECURITY = fields(
    "runAsNonRoot runAsUser",
    runAsNonRoot=TRUTH,
    runAsUser=COUNT,
    runAsGroup=COUNT,
    fsGroup=COUNT,
    seccompProfile=fields("type", type={"enum": ["RuntimeDefault", "Localhost", "Unconfined"]}),
)
TOLERATION = fields(
    key=STRING,
    operator={"enum": ["Exists", "Equal"]},
    value=STRING,
    effect={"enum": ["NoSchedule", "PreferNoSchedule", "NoExecute"]},
)
POD_SPEC = fields(
    "containers securityContext",
    containers={"type": "array", "items": CONTAINER, "minItems": 1},
    volumes=many(VOLUME),
    securityContext=POD_SECURITY,
    serviceAccountName=NAME,
    automountServiceAccountToken=TRUTH,
    terminationGracePeriodSeconds=COUNT,
    restartPolicy={"enum": ["Always", "OnFailure", "Never"]},
    tolerations=many(TOLERATION),
    nodeSelector=STRINGS,
)
POD_TEMPLATE = fields("spec", metadata=fields(labels=STRINGS), spec=POD_SPEC)


def _kind(kind: str, api: str, namespaced: bool = True, **properties: Schema) -> Schema:
    metadata = fields("name namespace" if namespaced else "name", name=NAME, namespace=NAME, labels=STRINGS)
    head = {"apiVersion": {"const": api}, "kind": {"const": kind}, "metadata": metadata}
    return fields(" ".join(["apiVersion kind metadata", *properties]), **head, **properties)


WORKLOAD = {"replicas": COUNT, "selector": SELECTOR, "template": POD_TEMPLATE}
CLAIM = fields(
    "metadata spec",
    metadata=fields("name", name=NAME),
    spec=fields("accessModes resources", accessModes=many(STRING), resources=fields("requests", requests=QUANTITIES)),
)
SERVICE = fields(
    "selector ports",
    type={"enum": ["ClusterIP", "NodePort", "LoadBalancer"]},
    selector=STRINGS,
    ports=many(fields("port", name=STRING, port=PORT, targetPort=PORT)),
)
CIDR: Schema = {"type": "string", "pattern": r"^[0-9]+(\.[0-9]+){3}/[0-9]+$"}
PEER = fields(
    podSelector=SELECTOR, namespaceSelector=SELECTOR, ipBlock=fields("cidr", cidr=CIDR, **{"except": many(CIDR)})
)  # the API server refuses ipBlock beside a selector
POLICY_PORTS = many(fields("port", protocol={"enum": ["TCP", "UDP", "SCTP"]}, port=PORT))
NETWORK_POLICY = fields(
    "podSelector policyTypes",
    podSelector=SELECTOR,
    policyTypes=many({"enum": ["Ingress", "Egress"]}),
    ingress=many(fields(**{"from": many(PEER)}, ports=POLICY_PORTS)),
    egress=many(fields(to=many(PEER), ports=POLICY_PORTS)),
)
HEAD_GROUP = fields("rayStartParams template", serviceType={"enum": ["ClusterIP"]}, rayStartParams=STRINGS, template=POD_TEMPLATE)
WORKER_GROUP = fields(
    "groupName minReplicas maxReplicas rayStartParams template",
    groupName=NAME,
    replicas=COUNT,
    minReplicas=COUNT,
    maxReplicas=COUNT,
    rayStartParams=STRINGS,
    template=POD_TEMPLATE,
)
RAY_CLUSTER = fields(
    "rayVersion authOptions enableInTreeAutoscaling autoscalerOptions headGroupSpec workerGroupSpecs",
    rayVersion=STRING,
    authOptions=fields("mode secretName", mode={"enum": ["disabled", "token"]}, secretName=NAME),
    gcsFaultToleranceOptions=fields(
        "redisAddress redisPassword", redisAddress=STRING, redisPassword=fields("valueFrom", valueFrom=SECRET_KEY)
    ),
    enableInTreeAutoscaling=TRUTH,
    autoscalerOptions=fields(
        "version",
        version={"enum": ["v1", "v2"]},
        idleTimeoutSeconds=COUNT,
        upscalingMode={"enum": ["Default", "Aggressive", "Conservative"]},
        imagePullPolicy=PULL,
        resources=RESOURCES,
        securityContext=LOCKED,
    ),
    headGroupSpec=HEAD_GROUP,
    workerGroupSpecs=many(WORKER_GROUP),
)
RAY_JOB = fields(
    "entrypoint rayClusterSpec",
    entrypoint=STRING,
    submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
    backoffLimit=COUNT,
    submitterConfig=fields("backoffLimit", backoffLimit=COUNT),
    shutdownAfterJobFinishes=TRUTH,
    ttlSecondsAfterFinished=COUNT,
    rayClusterSpec=RAY_CLUSTER,
    submitterPodTemplate=POD_TEMPLATE,
)
KINDS: dict[str, Schema] = {
    "Namespace": _kind("Namespace", "v1", namespaced=False),
    "ServiceAccount": fields(
        "apiVersion kind metadata", **_kind("ServiceAccount", "v1")["properties"], automountServiceAccountToken=TRUTH
    ),
    "Service": _kind("Service", "v1", spec=SERVICE),
    "NetworkPolicy": _kind("NetworkPolicy", "networking.k8s.io/v1", spec=NETWORK_POLICY),
    "Deployment": _kind("Deployment", "apps/v1", spec=fields("selector template", **WORKLOAD)),
    "StatefulSet": _kind(
        "StatefulSet",
        "apps/v1",
        spec=fields("serviceName selector template", serviceName=NAME, volumeClaimTemplates=many(CLAIM), **WORKLOAD),
    ),
    "RayCluster": _kind("RayCluster", "ray.io/v1", spec=RAY_CLUSTER),
    "RayJob": _kind("RayJob", "ray.io/v1", spec=RAY_JOB),
}

"""launch/gke_jobset.yaml against published schemas, unknown fields refused; no cluster has seen it.

The Job inside each JobSet is checked against the Kubernetes schemas that kubernetes-validate ships; the JobSet around it,
whose schema no package ships, against schemas/jobset_v1alpha2.json, which says where its fields were read.
"""

from __future__ import annotations

import copy
import json
import math
import re

import jsonschema
import kubernetes_validate
import pytest
import yaml
from helpers import ROOT

from uoe_jax import errors

FILE = ROOT / "launch" / "gke_jobset.yaml"
SCHEMA = json.loads((ROOT / "tests" / "schemas" / "jobset_v1alpha2.json").read_text())
JOBSETS = {d["metadata"]["labels"]["device"]: d for d in yaml.safe_load_all(FILE.read_text())}


def job_of(jobset: dict) -> dict:
    (job,) = jobset["spec"]["replicatedJobs"]
    assert set(job["template"]) <= {"metadata", "spec"}
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": "a"},
        "spec": job["template"]["spec"],
    }


def pod_of(jobset: dict) -> dict:
    return job_of(jobset)["spec"]["template"]["spec"]


def environment(jobset: dict) -> dict:
    """What a container's variables would be in the pod with index 1: its fields looked up, $(NAME) of earlier ones put in."""
    (container,) = pod_of(jobset)["containers"]
    fields = {
        "metadata.labels['jobset.sigs.k8s.io/jobset-name']": jobset["metadata"]["name"],
        "metadata.annotations['batch.kubernetes.io/job-completion-index']": "1",
    }
    found: dict[str, str] = {}
    for one in container["env"]:
        value = (
            fields[one["valueFrom"]["fieldRef"]["fieldPath"]]
            if "valueFrom" in one
            else one["value"]
        )
        found[one["name"]] = re.sub(r"\$\((\w+)\)", lambda m: found[m[1]], value)
    return found


def check(jobset: dict) -> None:
    jsonschema.validate(jobset, SCHEMA)
    for version in ("1.31", "1.37"):  # one that is old, and the newest known
        kubernetes_validate.validate(job_of(jobset), version, strict=True)


def test_there_is_one_for_gpus_and_one_for_tpus():
    assert list(JOBSETS) == ["gpu", "tpu"]
    names = [d["metadata"]["name"] for d in JOBSETS.values()]
    assert names == ["uoe-gpu", "uoe-tpu"]


@pytest.mark.parametrize("device", JOBSETS)
def test_fits_the_published_schemas(device):
    check(JOBSETS[device])


@pytest.mark.parametrize(
    "spoil",
    [
        lambda d: d["spec"].update(replicatedJob=[]),
        lambda d: d["spec"]["failurePolicy"].update(maxRestarts="100"),
        lambda d: d["spec"]["failurePolicy"]["rules"][0].update(action="Fail"),
        lambda d: job_of(d)["spec"].update(paralelism=2),
        lambda d: job_of(d)["spec"]["podFailurePolicy"]["rules"][0]["onExitCodes"].update(
            values="2"
        ),
        lambda d: pod_of(d).update(nodeSelectors={}),
        lambda d: pod_of(d)["containers"][0].update(comand=[]),
    ],
)
def test_the_check_can_fail(spoil):
    jobset = copy.deepcopy(JOBSETS["tpu"])
    spoil(jobset)
    with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError)):
        check(jobset)


@pytest.mark.parametrize("device", JOBSETS)
def test_processes_get_their_place(device):
    jobset, spec = JOBSETS[device], job_of(JOBSETS[device])["spec"]
    (replicated,) = jobset["spec"]["replicatedJobs"]
    name = jobset["metadata"]["name"]
    env = environment(jobset)
    assert spec["completionMode"] == "Indexed" and replicated["replicas"] == 1
    assert env["UOE_PROCESSES"] == str(spec["parallelism"]) == str(spec["completions"])
    assert env["UOE_PROCESS_ID"] == "1"
    # <JobSet>-<replicated job>-<job>-<pod>.<subdomain>, the latter by default the JobSet's name
    assert env["UOE_COORDINATOR"] == f"{name}-{replicated['name']}-0-0.{name}:8476"
    assert (
        jobset["spec"]["network"]["enableDNSHostnames"]
        and "subdomain" not in jobset["spec"]["network"]
    )
    assert pod_of(jobset)["automountServiceAccountToken"] is False


@pytest.mark.parametrize("device", JOBSETS)
def test_what_is_started_again(device):
    """2 and 76 fail the JobSet; every other end of a pod fails the Job, for which the JobSet starts all again."""
    jobset, spec = JOBSETS[device], job_of(JOBSETS[device])["spec"]
    assert (
        pod_of(jobset)["restartPolicy"] == "Never"
    )  # with which alone a podFailurePolicy is allowed
    (rule,) = spec["podFailurePolicy"]["rules"]
    (container,) = pod_of(jobset)["containers"]
    assert rule["action"] == "FailJob" and rule["onExitCodes"]["containerName"] == container["name"]
    assert rule["onExitCodes"]["operator"] == "In"
    assert rule["onExitCodes"]["values"] == [errors.EXIT_BAD_INPUT, errors.EXIT_BAD_NUMBERS]
    assert spec["backoffLimit"] == 0
    policy = jobset["spec"]["failurePolicy"]
    assert policy["maxRestarts"] > 0
    assert [(r["action"], r["onJobFailureReasons"]) for r in policy["rules"]] == [
        ("FailJobSet", ["PodFailurePolicy"])
    ]


def test_hardware():
    gpu, tpu = pod_of(JOBSETS["gpu"]), pod_of(JOBSETS["tpu"])
    assert gpu["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] >= 1
    assert "cloud.google.com/gke-accelerator" in gpu["nodeSelector"]
    topology = tpu["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    assert "cloud.google.com/gke-tpu-accelerator" in tpu["nodeSelector"]
    chips = math.prod(int(n) for n in topology.split("x"))
    assert (
        chips
        == job_of(JOBSETS["tpu"])["spec"]["parallelism"]
        * tpu["containers"][0]["resources"]["limits"]["google.com/tpu"]
    )
    for pod in (gpu, tpu):
        assert pod["terminationGracePeriodSeconds"] > 30
        (mount,), (volume,) = pod["containers"][0]["volumeMounts"], pod["volumes"]
        assert mount["name"] == volume["name"] and mount["mountPath"] == "/dev/shm"
        assert volume["emptyDir"] == {"medium": "Memory"}


def test_what_must_be_changed_is_marked():
    """Whatever names the user's image, bucket, machine or its size."""
    ones = "image:|args:|BUCKET|com/gpu:|com/tpu:|gke-accelerator:|gke-tpu-|parallelism:|completions:|UOE_PROCESSES"
    for line in FILE.read_text().splitlines():
        text, _, comment = line.partition("#")
        assert bool(re.search(ones, text)) == ("CHANGE" in comment and bool(text.strip())), line

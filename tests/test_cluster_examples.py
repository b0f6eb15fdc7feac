"""What starts a run on a cluster is understood: by its own language, and by helixpipe where it speaks to that."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from helixpipe.config_text import Arguments, build_config, merged, parse_arguments, read_toml

ROOT = Path(__file__).parents[1]
SBATCH = ROOT / "examples/slurm/train.sbatch"
YAML = ROOT / "examples/kubernetes/pytorchjob.yaml"
GUIDE = ROOT / "docs/guide/cluster.md"
WARNING_S = 120


def table(given: Arguments) -> dict[str, Any]:
    return (
        merged(read_toml(ROOT / "examples" / Path(given.path).name), given.overrides) if given.path else given.overrides
    )


def after_train(words: list[str]) -> Arguments:
    """What stands behind `-m helixpipe train`."""
    return parse_arguments(words[words.index("train") + 1 :])


def torchrun_options(words: list[str]) -> dict[str, str]:
    """Those that torchrun itself knows."""
    from torch.distributed.run import get_args_parser

    words = [re.sub(r"^(--[a-z-]+)=", r"\1 ", word) for word in words[words.index("torchrun") + 1 : words.index("-m")]]
    known, left = get_args_parser().parse_known_args([*" ".join(words).split(), "script"])
    assert not left, left
    return vars(known)


def sbatch_words() -> list[str]:
    text = SBATCH.read_text(encoding="utf-8")
    command = re.search(r"^srun (.*?) &$", text.replace("\\\n", " "), re.MULTILINE)
    assert command is not None
    return shlex.split(command[1].replace('"$config"', re.search(r"^config=(\S+)", text, re.MULTILINE)[1]))  # type: ignore[index]


def test_the_sbatch_script_is_bash_and_its_command_is_understood() -> None:
    done = subprocess.run(["bash", "-n", SBATCH], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stderr) == (0, "")
    words = sbatch_words()
    given = after_train(words)
    assert given.overrides["run"]["resume"] == "auto"
    config = build_config(table(given), 64)
    assert config.mesh_shape().size == 64
    options = torchrun_options(words)
    assert options["nproc_per_node"] == "8"
    assert "SIGUSR1" in options["signals_to_handle"].split(",")
    assert options["shutdown_timeout"] < WARNING_S
    assert f"#SBATCH --signal=B:USR1@{WARNING_S} " in SBATCH.read_text(encoding="utf-8")


def test_the_job_of_kubernetes_is_yaml_and_its_command_is_understood() -> None:
    yaml = pytest.importorskip("yaml")
    job = yaml.safe_load(YAML.read_text(encoding="utf-8"))
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    elastic, worker = job["spec"]["elasticPolicy"], job["spec"]["pytorchReplicaSpecs"]["Worker"]
    pod = worker["template"]["spec"]
    (container,) = pod["containers"]
    assert container["name"] == "pytorch"
    given, options = after_train(container["command"]), torchrun_options(container["command"])
    for nodes in (2, 4, 8):  # those that the comment promises
        assert elastic["minReplicas"] <= nodes <= elastic["maxReplicas"] == worker["replicas"]
        config = build_config(table(given), 8 * nodes)
        assert (config.mesh.dp, config.batch_size) == (nodes, 64)
    assert options["shutdown_timeout"] < pod["terminationGracePeriodSeconds"]
    assert int(options["nproc_per_node"]) == container["resources"]["limits"]["nvidia.com/gpu"]
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}


def test_commands_of_the_guide_are_understood() -> None:
    joined = re.sub(r" \\\n +", " ", GUIDE.read_text(encoding="utf-8"))
    lines = re.findall(r"^    (?:torchrun .*-m )?helixpipe train (.*)$", joined, re.MULTILINE)
    assert len(lines) >= 3
    for line in lines:
        given = parse_arguments(shlex.split(re.split(r" {3,}", line)[0]))
        assert build_config(table(given), 64 if (given.overrides.get("mesh") or {}).get("dp") == "auto" else None)


FAKES = {
    "srun": """
        trap 'echo heard USR1 >> log; exit "$AFTER_USR1"' USR1
        echo "srun $*" >> log
        if [ -n "$CODE" ]; then exit "$CODE"; fi
        touch started
        while :; do sleep 0.05; done
    """,
    "scontrol": 'if [ "$1" = show ]; then echo node-1; echo node-2; else echo "scontrol $*" >> log; fi',
}


@pytest.mark.parametrize(
    ("code", "signalled", "ended", "requeued"),
    [("0", False, 0, False), ("2", False, 2, False), ("75", False, 75, True), ("", True, 75, True)],
)
def test_the_sbatch_script_requeues_what_stopped_as_asked(
    tmp_path: Path, code: str, signalled: bool, ended: int, requeued: bool
) -> None:
    """With an srun and an scontrol that write down what they are asked."""
    for name, script in FAKES.items():
        (tmp_path / name).write_text("#!/bin/bash\n" + textwrap.dedent(script))
        (tmp_path / name).chmod(0o755)
    slurm = {
        "SLURM_JOB_NODELIST": "node-[1-2]",
        "SLURM_NNODES": "2",
        "SLURM_JOB_ID": "7",
        "CODE": code,
        "AFTER_USR1": "1",
    }
    process = subprocess.Popen(
        ["bash", SBATCH], cwd=tmp_path, env=os.environ | slurm | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    )
    try:
        if signalled:
            wait = f"import os, time\nwhile not os.path.exists({str(tmp_path / 'started')!r}): time.sleep(0.01)"
            subprocess.run([sys.executable, "-c", wait], timeout=60, check=True)
            process.send_signal(10)
        assert process.wait(60) == ended
    finally:
        process.kill()
    log = (tmp_path / "log").read_text().splitlines()
    assert "--rdzv-id 7 --rdzv-backend c10d --rdzv-endpoint node-1:29500" in log[0]
    assert log[1:] == ["heard USR1"] * signalled + ["scontrol requeue 7"] * requeued

"""What a plan leaves behind: a config that training runs once it is told what no plan knows, and how to start it.

[run] asks = ["data.path", "train.steps", "train.learning_rate"]        a run without one of them is refused by its name
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tomli_w

from helixpipe.commands.setting import dtype_of
from helixpipe.commands.shape_flags import changes_from
from helixpipe.config_text import build_config
from helixpipe.errors import ConfigError
from helixpipe.predict.candidates import Candidate
from helixpipe.predict.estimate import Setting
from helixpipe.predict.layouts import Layout

ASKED = ("data.path", "train.steps", "train.learning_rate")
"""What a plan cannot know."""
Tables = dict[str, dict[str, Any]]


def config_text(tables: Tables, about: Sequence[str]) -> str:
    """The config as TOML, under lines that say what it is of. Raises ConfigError where training would refuse it."""
    causal = _checked(tables)
    open_keys = [key for key in (*ASKED, *(() if causal else ("train.objective",))) if not _has(tables, key)]
    whole = {section: dict(keys) for section, keys in tables.items() if keys}
    whole.setdefault("run", {})["asks"] = open_keys
    return "".join(f"# {line}\n" for line in about) + "\n" + tomli_w.dumps(whole)


def _checked(tables: Tables) -> bool:
    """Builds it as training will; whether the model is causal."""
    try:
        return build_config(tables).shape().causal
    except ConfigError as error:
        if not str(error).startswith("model.causal"):
            raise
    train = {**tables.get("train", {}), "objective": "masked"}
    return build_config({**tables, "train": train}).shape().causal


def _has(tables: Tables, key: str) -> bool:
    section, _, name = key.partition(".")
    return name in tables.get(section, {})


def tables_of(layout: Layout, candidate: Candidate, setting: Setting, args: argparse.Namespace) -> Tables:
    """A plan as a config's tables; what it cannot know is left out."""
    mesh = layout.mesh
    is_folder = Path(args.model).exists() and Path(args.model).is_dir()
    shared = {"layout": mesh.layout, "context_method": mesh.context_method} if mesh.cp > 1 else {}
    schedule = {"evenness": candidate.evenness, "segment_multiple": setting.segment_multiple}
    return {
        "model": {"path" if is_folder else "name": args.model, **changes_from(args)},
        "schedule": {
            "family": candidate.family, "ranks": mesh.pp, "microbatches": layout.microbatches, **dict(candidate.options),
            **(schedule if "segments" in dict(candidate.options) else {}),
        },
        "mesh": {"dp": mesh.dp, "cp": mesh.cp, "tp": mesh.tp, **shared, "optimizer": layout.optimizer},
        "train": {"sequence_length": setting.sequence_length, "microbatch_size": layout.microbatch_size},
        "runtime": {
            "dtype": dtype_of(setting), "recompute": candidate.recompute, "mlp_chunk": candidate.chunk,
            "head_chunk": candidate.chunk, "communicators": setting.link.communicators,
        },
        "run": {"name": "planned"},
    }  # fmt: skip


def launch_line(config: str, accelerators: int, per_node: int) -> str:
    """What starts the run, on every node the same."""
    nodes, each = _nodes(accelerators, per_node)
    where = "--standalone" if nodes == 1 else f"--nnodes {nodes} --rdzv-backend c10d --rdzv-endpoint HOST:29500"
    return f"torchrun {where} --nproc-per-node {each} -m helixpipe train {config} --resume"


def _nodes(accelerators: int, per_node: int) -> tuple[int, int]:
    return -(-accelerators // per_node), min(accelerators, per_node)


def slurm_script(script: str, config: str, accelerators: int, per_node: int) -> str:
    """A batch script that starts the run and goes on with it."""
    nodes, each = _nodes(accelerators, per_node)
    name = Path(config).stem
    return SLURM.format(script=script, config=config, nodes=nodes, each=each, name=name, cpus=8 * each)


# as examples/slurm/train.sbatch, with sizes left open
SLURM = """\
#!/bin/bash
# A run of helixpipe on {nodes} nodes of {each} GPUs:  sbatch {script}
#
# The same command line starts the run and goes on with it, after a requeue and after torchrun started ranks again: --resume
# takes the newest good checkpoint of run.folder, or begins where there is none. docs/guide/cluster.md says more.

#SBATCH --job-name={name}
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node=1           # one torchrun a node; it starts a rank for each GPU
#SBATCH --gpus-per-node={each}             # all of a node's GPUs are seen by each of its ranks, which takes the one of its number
#SBATCH --cpus-per-task={cpus}
#SBATCH --time=24:00:00
#SBATCH --requeue                     # Slurm may start this job again, after a node failed too
#SBATCH --open-mode=append            # and then goes on in the same output file
#SBATCH --signal=B:USR1@120           # 120 s before the time is up this shell (B:) hears USR1: more than a step and a checkpoint

config={config}

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)   # the node where ranks meet, any of them
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0   # where nodes have several networks: the one that joins them

# srun hands the signal to every torchrun, and these to their ranks, which end after the step with a checkpoint
warned=
trap 'warned=yes; kill -USR1 "$step"' USR1

srun torchrun \\
    --nnodes "$SLURM_NNODES" --nproc-per-node {each} \\
    --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d --rdzv-endpoint "$head:29500" \\
    --max-restarts 3 \\
    --signals-to-handle SIGUSR1,SIGTERM,SIGINT --shutdown-timeout 110 \\
    -m helixpipe train "$config" --resume &
step=$!

wait "$step"; code=$?
while kill -0 "$step" 2>/dev/null; do   # a signal ends the wait, and not the run
    wait "$step"; code=$?
done

# ranks that stop as asked end with 75; torchrun ends with 1 whatever its ranks end with, so what they were asked is kept here
if [ -n "$warned" ] && [ "$code" -ne 0 ]; then code=75; fi

if [ "$code" -eq 75 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
"""

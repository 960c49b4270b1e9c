"""What the trackers of a run have written, read back from their own files."""

import json
import struct
from pathlib import Path

from gtalign_jax.training.services import tracked_name


def wandb_records(workdir: Path) -> list:
    """All records of all offline files in order: blocks of 32 KiB with pieces of records, each with
    checksum, length and kind (1: whole, 2: first, 3: middle, 4: last)."""
    from wandb.proto import wandb_internal_pb2

    found = []
    for file in sorted((workdir / "wandb").glob("offline-run-*/*.wandb")):
        data, at, whole = file.read_bytes(), 7, b""
        while at + 7 <= len(data):
            room = 32768 - at % 32768
            if room < 7:
                at += room
                continue
            _, length, kind = struct.unpack("<IHB", data[at : at + 7])
            whole += data[at + 7 : at + 7 + length]
            at += 7 + length
            if kind in (1, 4):
                found.append(wandb_internal_pb2.Record.FromString(whole))
                whole = b""
    return found


def wandb_rows(workdir: Path) -> list[dict]:
    return [
        {"/".join(item.nested_key) or item.key: json.loads(item.value_json)
         for item in record.history.item}
        for record in wandb_records(workdir) if record.HasField("history")
    ]


def mlflow_run(folder: Path, name: str):
    """(client, the only run of that name in a local store)."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{folder}/mlflow.db")
    experiment = client.get_experiment_by_name("gtalign_jax")
    (found,) = client.search_runs([experiment.experiment_id], f"run_name = '{name}'")
    return client, found


def tensorboard_rows(directory: Path) -> list[tuple[str, int, float]]:
    """(name, step, value) of event files: records of length, checksum, event, checksum."""
    from tensorboardX.proto import event_pb2

    found = []
    for file in sorted(directory.glob("events.out.*")):
        data, at = file.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack("<Q", data[at : at + 8])
            event = event_pb2.Event.FromString(data[at + 12 : at + 12 + length])
            found += [(v.tag, event.step, v.simple_value) for v in event.summary.value]
            at += 16 + length
    return found


def as_tracked(row: dict) -> dict[str, float]:
    """A row of metrics.jsonl as it should be seen elsewhere."""
    return {tracked_name(row["stage"], name): value for name, value in row.items()
            if name not in ("stage", "step") and value is not None}

"""Writes tensors in the format of `torch.distributed.checkpoint`, from one process, without a group.

Imported by the thread that writes alone: it takes longer than writing a small model does.
"""

import io
import json
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import StorageMeta
from torch.distributed.checkpoint.planner import WriteItem, WriteItemType

from gaccum_exp.train.checkpoint.dcp_reader import VALUES
from gaccum_exp.train.checkpoint.encoding import Encoded


def save(path: Path, encoded: Encoded) -> None:
    """Write tensors and values into a folder, flushed to the disk."""
    writer = _Writer(path, per_thread_copy_ahead=0)
    planner = _Planner(flatten_state_dict=False, flatten_sharded_tensors=False)
    tree: dict[str, Any] = {**encoded.tensors, VALUES: encoded.values}
    planner.set_up_planner(tree, writer.storage_meta(), is_coordinator=True)
    writer.set_up_storage_writer(is_coordinator=True)
    plan = writer.prepare_local_plan(planner.create_local_plan())
    plans, metadata = planner.create_global_plan([plan])
    (plan,) = writer.prepare_global_plan(plans)
    written = writer.write_data(planner.finish_plan(plan), planner)
    writer.finish(metadata, [written.wait()])


class _Writer(FileSystemWriter):
    def storage_meta(self) -> StorageMeta | None:
        """Return nothing: where a checkpoint was written is no part of it."""
        return None


class _Planner(DefaultSavePlanner):
    def transform_object(self, write_item: WriteItem, object: Any) -> Any:
        """Return what is no tensor as JSON, which needs no pickle to be read."""
        if write_item.type == WriteItemType.BYTE_IO:
            return io.BytesIO(json.dumps(object).encode())
        return object

"""Makes test/golden/tensorboard.json: the bytes of an event file as TensorBoard's own record writer and messages give them.

    python scripts/golden/tensorboard_events.py        (needs the package tensorboard)
"""

import io

from common import GOLDEN, write_json

import tensorboard
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

EVENTS = [
    {"step": 1, "time": 1732600000.25, "values": {"train/loss": 2.5, "train/learning_rate": 1e-4}},
    {"step": 300, "time": 1732600001.5, "values": {"valid/loss": 0.1}},
    {"step": 5_000_000_000, "time": 1732600002.0, "values": {"ä": -1.0}},
]

written = io.BytesIO()
written.close = lambda: None
writer = RecordWriter(written)
writer.write(Event(wall_time=1732600000.0, file_version="brain.Event:2").SerializeToString())
for event in EVENTS:
    values = [Summary.Value(tag=tag, simple_value=value) for tag, value in event["values"].items()]
    writer.write(Event(wall_time=event["time"], step=event["step"], summary=Summary(value=values)).SerializeToString())

write_json(
    GOLDEN / "tensorboard.json",
    {"made_with": f"tensorboard {tensorboard.__version__}", "time": 1732600000.0, "events": EVENTS, "hex": written.getvalue().hex()},
)

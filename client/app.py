"""The device's Flower app: parses, lets `client.local` do the work, replies."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from client.bases import Bases
from client.device import Device
from client.wire import Arrays
from common.accelerator import Accelerator
from common.config import Config
from common.errors import ConfigError, FallowError
from common.order import Report, read_order
from common.process import settle
from common.update import array_fields, read_array

_BASES: dict[Path, Bases] = {}


def make_app(settings: Mapping[str, Any] | None = None, cache: str | None = None) -> ClientApp:
    """Return the device's app.

    Parameters
    ----------
    settings : mapping, optional
        Kebab-case settings that stand in for the run config where the engine passes none.
    cache : str, optional
        Folder of the base models; the node config's ``cache`` goes first.
    """
    app = ClientApp()

    @app.query()
    def hello(message: Message, context: Context) -> Message:
        """Tell the device's name."""
        try:
            with _device(context, _config(context, settings)) as device:
                return _reply(message, Report(device=device.device))
        except FallowError as error:
            return _reply(message, Report(device="", declined=str(error)))

    @app.train()
    def work(message: Message, context: Context) -> Message:
        """Carry out one order."""
        settle(int(os.environ.get("OMP_NUM_THREADS", "1")))
        config = _config(context, settings)
        with _device(context, config) as device:  # as in hello, which every node has passed
            try:
                order = read_order(str(message.content.config_records["order"]["json"]))
                if ":" in order.net.name and order.net.name != config.net:
                    # module:function imports and runs code: only the device's own settings may.
                    raise ConfigError(
                        f"the server asks for net '{order.net.name}', this device's settings "
                        f"name '{config.net}': set net to it on the device if you trust it"
                    )
                accelerator = Accelerator.pick(
                    config.accelerator, config.amp, lean=config.lean, cache_mib=config.cache_mib
                )
                report, update = device.carry_out(
                    order, _arrays(message), _bases(context, cache), accelerator
                )
            except FallowError as error:
                return _reply(message, Report(device=device.device, declined=str(error)))
        return _reply(message, report, update)

    return app


def _config(context: Context, settings: Mapping[str, Any] | None) -> Config:
    """Return the run's settings; ``out`` and ``resume`` concern only the server."""
    values = dict(context.run_config) or dict(settings or {})
    known = {key: value for key, value in values.items() if key not in ("out", "resume")}
    if "num-partitions" in context.node_config:
        known["devices"] = int(context.node_config["num-partitions"])
    return Config.parse(known)


@contextlib.contextmanager
def _device(context: Context, config: Config) -> Iterator[Device]:
    """Return the device that the node config names: a store of its own, or a simulated share."""
    node = context.node_config
    # Each imports what only it needs: every message of a real device starts a new process.
    if "store" in node:
        from client.index import Index
        from client.own import OwnDevice

        with Index.open(Path(str(node["store"]))) as index:
            yield OwnDevice(index, config, str(context.run_id))
    elif "partition-id" in node:
        from client.simulated import SimulatedDevice

        yield SimulatedDevice(config, int(node["partition-id"]))
    else:
        raise ConfigError("node config has no 'store' (a device's own) and no 'partition-id'")


def _bases(context: Context, cache: str | None) -> Bases:
    node = context.node_config
    default = cache or Path(tempfile.gettempdir()) / f"fallow-{os.getuid()}" / "bases"
    if "store" in node:
        default = Path(str(node["store"])) / "bases"
    folder = Path(str(node.get("cache", default)))
    if folder not in _BASES:
        # A simulated device's disk is not worth waiting for.
        _BASES[folder] = Bases(folder, durable="partition-id" not in node)
    return _BASES[folder]


def _arrays(message: Message) -> Arrays:
    record: Any = message.content.array_records.get("arrays", {})
    names = [field.name for field in fields(Arrays) if field.name in record]
    return Arrays(**{name: read_array(record[name].data, f"'{name}'") for name in names})


def _reply(message: Message, report: Report, update: Any = None) -> Message:
    # what few orders ask for costs no other reply a byte
    absent = {name for name in ("peer_right", "rival_right") if not getattr(report, name)}
    text = report.model_dump_json(exclude=absent)
    content = RecordDict({"report": ConfigRecord({"json": text})})
    if update is not None:
        content["arrays"] = ArrayRecord({"update": Array(*array_fields(update))})
    return Message(content, reply_to=message)


app = make_app()

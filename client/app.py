"""The device's Flower app: parses, lets `client.local` do the work, replies."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from client.bases import Bases
from client.local import carry_out
from client.simulated import SimulatedDevice
from client.wire import Arrays
from common.accelerator import Accelerator
from common.config import Config
from common.errors import ConfigError, FallowError
from common.order import Report, read_order
from common.update import read_array

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
            device = _device(context, _config(context, settings))
        except FallowError as error:
            return _reply(message, Report(device="", declined=str(error)))
        return _reply(message, Report(device=device.device))

    @app.train()
    def work(message: Message, context: Context) -> Message:
        """Carry out one order."""
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        config = _config(context, settings)
        device = _device(context, config)  # as in hello, which every node has passed
        try:
            order = read_order(str(message.content.config_records["order"]["json"]))
            if ":" in order.net.name and order.net.name != config.net:
                # module:function imports and runs code: only the device's own settings may.
                raise ConfigError(
                    f"the server asks for net '{order.net.name}', this device's settings name "
                    f"'{config.net}': set net to it on the device if you trust it"
                )
            accelerator = Accelerator.pick(
                config.accelerator, config.amp, lean=config.lean, cache_mib=config.cache_mib
            )
            report, update = carry_out(
                order, _arrays(message), device, _bases(context, cache), accelerator
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


def _device(context: Context, config: Config) -> SimulatedDevice:
    node = context.node_config
    if "partition-id" not in node:
        raise ConfigError("node config has no 'partition-id': only simulated devices work yet")
    return SimulatedDevice(config, int(node["partition-id"]))


def _bases(context: Context, cache: str | None) -> Bases:
    default = cache or Path(tempfile.gettempdir()) / f"fallow-{os.getuid()}" / "bases"
    folder = Path(str(context.node_config.get("cache", default)))
    return _BASES.setdefault(folder, Bases(folder))


def _arrays(message: Message) -> Arrays:
    record: Any = message.content.array_records.get("arrays", {})
    names = [field.name for field in fields(Arrays) if field.name in record]
    return Arrays(**{name: read_array(record[name].data, f"'{name}'") for name in names})


def _reply(message: Message, report: Report, update: Any = None) -> Message:
    content = RecordDict({"report": ConfigRecord({"json": report.model_dump_json()})})
    if update is not None:
        content["arrays"] = ArrayRecord({"update": Array(update)})
    return Message(content, reply_to=message)


app = make_app()

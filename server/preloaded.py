"""What the process imports that simulation's workers are forked from (see `server.workers`)."""

from importlib import import_module

from common.garbage import hasten_imports, settle_imports

hasten_imports()
# The last is what a worker finds as its main module when `fallow` is called.
for name in ("client.app", "common.tracing", "server.cli"):
    import_module(name)
settle_imports()

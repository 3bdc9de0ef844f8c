"""Python runs this first in a process that has this folder on its path: sets its clock wrong."""

import os
from datetime import UTC, datetime, timedelta

import time_machine

wrong = datetime.now(UTC) + timedelta(seconds=float(os.environ["CLOCK_OFF_BY"]))
time_machine.travel(wrong, tick=True).start()

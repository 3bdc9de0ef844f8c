#!/usr/bin/env bash
# Run fallow through `flwr run` on Flower's Simulation Runtime (Ray), with a SuperLink of our own
# that ends with this script. Usage: deploy/flwr-run.sh OUT [DATA] [KEY=VALUE ...]
set -euo pipefail
app=$(cd "$(dirname "$0")/.." && pwd)
out=$(realpath -m "${1:?usage: deploy/flwr-run.sh OUT [DATA] [KEY=VALUE ...]}")
data=${2:-digits}
[ ! -e "$data" ] || data=$(realpath "$data")
shift $(( $# > 1 ? 2 : 1 ))

export OMP_NUM_THREADS=1 FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1
export RAY_USAGE_STATS_ENABLED=0 FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1
work=$(mktemp -d)
export FLWR_HOME="$work/home"
port=$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
mkdir -p "$FLWR_HOME" "$work/empty"

devices=8
overrides="out='$out' data='$data'"
for pair in "$@"; do
  case "$pair" in
    devices=*) devices=${pair#devices=} ;;
  esac
  key=${pair%%=*} value=${pair#*=}
  case "$value" in
    true|false) ;;
    *[!0-9.e-]*) value="'$value'" ;;
  esac
  overrides="$overrides $key=$value"
done
cat > "$FLWR_HOME/config.toml" <<TOML
[superlink]
default = "fallow"

[superlink.fallow]
address = "127.0.0.1:$port"
insecure = true
TOML

# Ray's actors import from the SuperLink's working folder: an empty one, or another checkout
# there would shadow this app.
(cd "$work/empty" && exec flower-superlink --insecure --simulation --port "$port") \
  > "$work/superlink.log" 2>&1 &
superlink=$!
trap 'kill "$superlink" 2>/dev/null || true; wait "$superlink" 2>/dev/null || true; rm -rf "$work"' EXIT
for _ in $(seq 60); do
  python - "$port" <<'PY' && break
import socket, sys
sys.exit(socket.socket().connect_ex(("127.0.0.1", int(sys.argv[1]))) != 0)
PY
  sleep 1
done
(cd "$app" && flwr run . fallow --stream --federation-config "num-supernodes=$devices" \
  --run-config "$overrides") || true
# `flwr run --stream` ends well even when the run failed: what it left behind is the verdict.
python - "$out" <<'PY' || { tail -n 40 "$work/superlink.log"; exit 1; }
import json, pathlib, sys
summary = pathlib.Path(sys.argv[1]) / "summary.json"
status = json.loads(summary.read_text())["status"] if summary.exists() else "no summary"
print(f"{summary}: {status}")
sys.exit(status != "complete")
PY

#!/usr/bin/env bash
# The parties of a federation under torchrun: ranks 0, 1, ... are the hospitals, the last rank is the aggregator.
# Usage: examples/torchrun.sh [DIRECTORY]     (needs `make install`; all parties run on this machine)
#
# For rehearsals and measurements within one organisation: all parties belong to whoever starts them, and torchrun's own
# rendezvous is neither encrypted nor authenticated. Between hospitals each one starts `mpc-fl party` itself
# (examples/by_hand.sh). Over several machines of one organisation, on machine K of N with one party each:
#   torchrun --nnodes N --node-rank K --nproc-per-node 1 --master-addr FIRST_MACHINE -m mpc_fl party --config ...
set -euo pipefail
cd "$(dirname "$0")/.."
work=${1:-$(mktemp -d)}
bin=${BIN:-.venv/bin}
hospitals=${HOSPITALS:-3}
port=${FIRST_PORT:-47120}
umask 077
mkdir -p "$work"

names=()
for ((rank = 0; rank < hospitals; rank++)); do names+=("hospital-$rank"); done
names+=(aggregator)

# The one file that all parties share: who takes part, at which address, in a session that is used once.
{
    cat <<YAML
name: torchrun
data: {image_size: 16, phantoms: {train_patients: 150, test_patients: 60}}
training: {rounds: 2, local_steps: 4, batch_size: 32}
privacy: {delta: 1.0e-3}
federation:
  hospitals: $hospitals
  session: $(date +%s)-$RANDOM
  addresses:
YAML
    for index in "${!names[@]}"; do echo "    ${names[index]}: 127.0.0.1:$((port + index))"; done
} > "$work/federation.yaml"

# A throw-away authority; a lasting one is kept with `mpc-fl pki`.
"$bin/python" - "$work" "${names[@]}" <<'PY'
import sys
from pathlib import Path
from mpc_fl.crypto.authority import make_local_identities
make_local_identities(sys.argv[2:], {name: Path(sys.argv[1]) / name / "identity" for name in sys.argv[2:]})
PY

# {party} stands for the name of the party each process finds itself to be. No restarts: a session is used once.
"$bin/torchrun" --standalone --max-restarts 0 --nproc-per-node "${#names[@]}" -m mpc_fl party \
    --config "$work/federation.yaml" --identity "$work/{party}/identity" --out "$work/{party}"
echo "The aggregator's model: $work/aggregator/model.safetensors"

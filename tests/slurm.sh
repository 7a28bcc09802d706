#!/bin/bash
# A Slurm cluster of two nodes on this one machine, to try job scripts on. Needs root and Debian's slurm-wlm and munge.
#     tests/slurm.sh start FOLDER        then: export SLURM_CONF=FOLDER/slurm.conf; sinfo
#     tests/slurm.sh stop FOLDER
set -eu
what=$1 folder=$(realpath -m "$2")
export SLURM_CONF=$folder/slurm.conf
case $what in
start)
    mkdir -p "$folder"/{state,spool-a,spool-b} /run/munge
    chown munge: /run/munge
    munge -n >/dev/null 2>&1 || { runuser -u munge -- munged; touch "$folder/munged"; } # daemons trust each other by munge's key
    me=$(hostname -s)
    {
        echo "ClusterName=classroom"
        echo "SlurmctldHost=$me(127.0.0.1)"
        echo "SlurmctldPort=${PORT:-17100}"
        echo "SlurmUser=root"
        echo "AuthType=auth/munge"
        echo "AuthInfo=cred_expire=15" # a requeued job waits this many seconds (default 120)
        echo "StateSaveLocation=$folder/state"
        echo "SlurmdSpoolDir=$folder/spool-%n"
        for d in Slurmctld Slurmd; do echo "${d}PidFile=$folder/$d-%n.pid"; echo "${d}LogFile=$folder/$d-%n.log"; done
        echo "ProctrackType=proctrack/linuxproc" # no cgroups
        echo "TaskPlugin=task/none"
        echo "SelectType=select/cons_tres"
        echo "ReturnToService=2"
        port=${PORT:-17100}
        for node in a b; do port=$((port + 1)); echo "NodeName=$node NodeHostname=$me NodeAddr=127.0.0.1 Port=$port CPUs=1"; done
        echo "PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP"
    } | sed 's/\(Slurmctld[a-zA-Z]*=.*\)-%n/\1/' >"$SLURM_CONF"
    slurmctld
    slurmd -N a
    slurmd -N b
    for _ in {1..60}; do
        [ "$(sinfo -ho %T%D)" = idle2 ] && exit 0
        sleep 0.5
    done
    sinfo
    exit 1
    ;;
stop)
    scancel --partition=all || true
    for _ in {1..80}; do [ -z "$(squeue -h 2>/dev/null)" ] && break; sleep 0.5; done # a job would outlive its daemons
    scontrol shutdown
    for pid in $(cat "$folder"/*.pid); do while kill -0 "$pid" 2>/dev/null && ! grep -q ') Z' "/proc/$pid/stat"; do sleep 0.2; done; done
    if [ -e "$folder/munged" ]; then runuser -u munge -- munged --stop; fi
    ;;
*)
    echo "start or stop, not $what"
    exit 2
    ;;
esac

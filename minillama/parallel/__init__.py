"""Parallelism, applied to the Llama of model.py from outside: mesh, shard, state; and planned, rehearsed and launched: plan, dryrun, launch."""

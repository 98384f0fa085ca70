#!/bin/bash
# Tells Ray that this node is about to be preempted, so that runs save at once and continue elsewhere. The sign is AWS's preemption notice
# for a spot instance, two minutes ahead, or SIGTERM to this script, as other schedulers send. Start it beside `ray start`.
exec 9>/tmp/watch_for_notice.lock; flock -n 9 || exit 0 # one watcher is enough
metadata=${NOTICE_SERVER:-http://169.254.169.254/latest}
seconds=${NOTICE_SECONDS:-110}

announce() {
  python - "$seconds" <<'PYTHON' && exit # on failure, the next round tries again
import subprocess, sys
import ray
ray.init(address="auto", log_to_driver=False, logging_level="ERROR")
node_id = ray.get_runtime_context().get_node_id()
subprocess.run(
    ["ray", "drain-node", "--node-id", node_id, "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "notice",
     "--deadline-remaining-seconds", sys.argv[1]],
    check=True,
)
PYTHON
}

terminated=
trap 'terminated=1' TERM
while true; do
  [ -z "$terminated" ] || announce
  token=$(curl -s -m 2 -X PUT "$metadata/api/token" -H "X-aws-ec2-metadata-token-ttl-seconds: 60")
  if curl -sf -m 2 -o /dev/null -H "X-aws-ec2-metadata-token: $token" "$metadata/meta-data/spot/instance-action"; then
    announce
  fi
  sleep 5 &
  wait $!
done

#!/bin/bash
# Tells Ray that this machine is about to be taken away, so that runs save at once and go on elsewhere: on AWS's notice for a spot machine,
# two minutes ahead, or on SIGTERM to this script (as other schedulers send). Start it beside `ray start`; it ends with the machine.
exec 9>/tmp/watch_for_notice.lock; flock -n 9 || exit 0 # one watcher is enough
metadata=${NOTICE_SERVER:-http://169.254.169.254/latest}
seconds=${NOTICE_SECONDS:-110}

announce() {
  python - "$seconds" <<'PYTHON' && exit # else it is tried again
import subprocess, sys
import ray
ray.init(address="auto", log_to_driver=False, logging_level="ERROR")
here = ray.get_runtime_context().get_node_id()
subprocess.run(
    ["ray", "drain-node", "--node-id", here, "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "notice",
     "--deadline-remaining-seconds", sys.argv[1]],
    check=True,
)
PYTHON
}

told=
trap 'told=1' TERM
while true; do
  [ -z "$told" ] || announce
  token=$(curl -s -m 2 -X PUT "$metadata/api/token" -H "X-aws-ec2-metadata-token-ttl-seconds: 60")
  if curl -sf -m 2 -o /dev/null -H "X-aws-ec2-metadata-token: $token" "$metadata/meta-data/spot/instance-action"; then
    announce
  fi
  sleep 5 &
  wait $!
done

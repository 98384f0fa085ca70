"""AWS for tests of a cluster: moto's server, which also records the requests for instances and can run out of spot instances.

`python -m tests.aws_server ADDRESS FOLDER` listens on port 5000. Each request for instances (RunInstances) becomes a line of
FOLDER/launches.jsonl, an object of its fields. While FOLDER/no_spot exists, the server refuses requests for spot instances as AWS does.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import run_simple

PORT = 5000
LAUNCHES, NO_SPOT = "launches.jsonl", "no_spot"
_REFUSED = """<?xml version="1.0" encoding="UTF-8"?><Response><Errors><Error><Code>InsufficientInstanceCapacity</Code>
<Message>There is no Spot capacity available.</Message></Error></Errors><RequestID>x</RequestID></Response>"""


def main() -> None:
    """Serve until someone kills the process."""
    address, folder = sys.argv[1], Path(sys.argv[2])
    moto = DomainDispatcherApplication(create_backend_app)

    def application(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        environ["wsgi.input"] = io.BytesIO(body)
        fields = dict(parse_qsl(body.decode("utf-8", "replace")))
        if fields.get("Action") == "RunInstances":
            with (folder / LAUNCHES).open("a", encoding="utf-8") as file:
                file.write(json.dumps(fields) + "\n")
            if fields.get("InstanceMarketOptions.MarketType") == "spot" and (folder / NO_SPOT).exists():
                start_response("500 Internal Server Error", [("Content-Type", "text/xml")])
                return [_REFUSED.encode()]
        answer: Iterable[bytes] = moto(environ, start_response)
        return answer

    run_simple(address, PORT, application, threaded=True)


if __name__ == "__main__":
    main()

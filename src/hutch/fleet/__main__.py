"""``python -m hutch.fleet api`` and ``python -m hutch.fleet runner``."""

from __future__ import annotations

import argparse
import functools
import os
from pathlib import Path

import anyio

from hutch.fleet.serve import serve_api, serve_runner


def main() -> None:
    """Run the process that the arguments name."""
    parser = argparse.ArgumentParser(prog="hutch.fleet")
    kinds = parser.add_subparsers(dest="kind", required=True)
    api = kinds.add_parser("api")
    api.add_argument("--database", type=Path, required=True)
    api.add_argument("--api-key", action="append", default=[])
    runner = kinds.add_parser("runner")
    runner.add_argument("--join", required=True, metavar="URL")
    runner.add_argument("--home", type=Path)
    runner.add_argument("--public-url")
    for kind in (api, runner):
        kind.add_argument("--host", default="127.0.0.1")
        kind.add_argument("--port", type=int, default=0)
        kind.add_argument("--token", default=os.environ.get("HUTCH_JOIN_TOKEN"), help="what runners join with")
    args = parser.parse_args()
    if not args.token:
        parser.error("give the token that runners join with: --token or HUTCH_JOIN_TOKEN")
    if args.kind == "api":
        anyio.run(
            functools.partial(
                serve_api,
                database=args.database,
                join_token=args.token,
                host=args.host,
                port=args.port,
                api_keys=args.api_key,
            )
        )
    else:
        anyio.run(
            functools.partial(
                serve_runner,
                join=args.join,
                token=args.token,
                home=args.home,
                host=args.host,
                port=args.port,
                public_url=args.public_url,
            )
        )


if __name__ == "__main__":
    main()

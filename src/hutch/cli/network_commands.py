"""The commands for the network of boxes."""

from __future__ import annotations

from hutch.cli.parser import Argument, Command, Option
from hutch.cli.shared_options import ALLOW_NET, BOX, JSON, RATES

NETWORK_COMMANDS = (
    Command(
        "net show",
        "Network",
        "Show the policy of a box, and its published ports",
        "network:show",
        (BOX,),
        (JSON,),
    ),
    Command(
        "net set",
        "Network",
        "Change whom a box may reach, also while it runs",
        "network:set_",
        (BOX,),
        (Option("--network", "MODE", "everybody or nobody", choices=("enabled", "disabled")), ALLOW_NET, *RATES),
        (
            "hutch net set dev --allow-net packages.example.com:443 --allow-net files.example.com:443",
            "hutch net set dev --receive-rate 2m --send-rate none",
        ),
        notes="What is given replaces what was. Connections that are not allowed any more end.",
    ),
    Command("net log", "Network", "Print what a box was refused", "network:log", (BOX,), (JSON,)),
    Command(
        "port-forward",
        "Network",
        "Let a port of this host lead to a TCP port of a box, until Ctrl-C",
        "network:port_forward",
        (BOX, Argument("PORT", "[HOST_PORT:]PORT; without HOST_PORT one that is free")),
        examples=("hutch port-forward dev 8080:80",),
    ),
)

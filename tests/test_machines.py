"""The promises hold for several machines with one database."""

import os
import re
import shutil
import subprocess

from tests.tools import Server, SystemTest, blocks, can_bind, free_port, wait_until
from tests.tools_database import setUpModule
from tests.tools_events import oracle, write_events
from tests.tools_faults import FaultyProxy


class Machines(SystemTest):
    """Three servers with a log each behind a load balancer, on one database."""

    def balance(self, ports):
        """Start nginx, or a round-robin proxy when it is not installed; return the port."""
        nginx = shutil.which("nginx", path=os.environ["PATH"] + ":/usr/sbin")
        if not nginx:
            proxy = FaultyProxy(ports, 0)
            proxy.calm = True
            self.addCleanup(proxy.close)
            return proxy.port
        port = free_port()
        (site,) = blocks("nginx")  # the README's, without TLS
        site = re.sub(r" *ssl_certificate.*\n", "", site).replace(
            "listen 443 ssl", f"listen 127.0.0.1:{port}"
        )
        upstream = "".join(f"server 127.0.0.1:{port} max_fails=0; " for port in ports)
        site = site.replace("server 127.0.0.1:8000;", upstream)
        temporary = "".join(
            f"{kind}_temp_path {self.directory}; "
            for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        configuration = self.path(
            "nginx.conf",
            f"""
            daemon off; pid {self.directory}/nginx.pid;
            error_log {self.directory}/nginx.log; events {{}}
            http {{ access_log off; {temporary} {site} }}""",
        )
        balancer = subprocess.Popen(
            [nginx, "-c", configuration, "-p", self.directory], stderr=subprocess.DEVNULL
        )

        def end():
            balancer.terminate()
            balancer.wait()

        self.addCleanup(end)
        wait_until(lambda: not can_bind(port), "nginx listens")
        return port

    def test_totals_are_exact_although_servers_are_killed(self):
        secret = {"EVENTS_AUTHORIZATION": "secret"}
        servers = [Server(self, log=f"log{n}", **secret) for n in range(3)]
        port = self.balance([server.port for server in servers])
        files = [write_events(self.path(f"events{n}"), 60_000, seed=n) for n in range(3)]
        clients = [
            self.start(
                "client.py",
                events,
                "--url",
                f"http://127.0.0.1:{port}/liveEvent",
                "--batch-size",
                100,
                **secret,
            )
            for events in files
        ]
        followers = [self.start("data_processor.py", "--follow", server.log) for server in servers]
        kills = 0
        while any(client.poll() is None for client in clients):
            n = kills % 3
            size = servers[n].log.stat().st_size
            wait_until(
                lambda: servers[n].log.stat().st_size > size + 100_000
                or all(client.poll() is not None for client in clients),
                "the log grows",
            )
            servers[n].kill()
            kills += 1
            servers[n] = Server(self, log=f"log{n}", port=servers[n].port, **secret)
        for client in clients:
            output, errors = client.communicate()
            self.assertEqual(client.returncode, 0, errors)
        for follower in followers:
            follower.terminate()
            self.assertEqual(follower.wait(20), 0)
        self.processor(*[server.log for server in servers])
        self.assertRevenue(oracle(*files))
        self.processor("--verify", *[server.log for server in servers])
        self.assertGreater(kills, 2)
        self.assertTrue(all(server.log.stat().st_size for server in servers))

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

    SECRET = {"EVENTS_AUTHORIZATION": "secret"}
    KILLS = 6

    def balance(self, ports):
        """Start nginx, or a proxy when it is not installed; return the port."""
        nginx = shutil.which("nginx", path=os.environ["PATH"] + ":/usr/sbin")
        if not nginx:
            proxy = FaultyProxy(ports, 0)
            proxy.calm = True
            self.addCleanup(proxy.close)
            return proxy.port
        port = free_port()
        configuration = self.path("nginx.conf", self.nginx_configuration(port, ports))
        balancer = subprocess.Popen(
            [nginx, "-c", configuration, "-p", self.directory], stderr=subprocess.DEVNULL
        )

        def end():
            balancer.terminate()
            balancer.wait()

        self.addCleanup(end)
        wait_until(lambda: not can_bind(port), "nginx listens")
        return port

    def nginx_configuration(self, port, ports):
        """Return the README's configuration of nginx, at another port, without TLS."""
        (site,) = blocks("nginx")
        site = re.sub(r" *ssl_certificate.*\n", "", site)
        site = site.replace("listen 443 ssl", f"listen 127.0.0.1:{port}")
        servers = [f"server 127.0.0.1:{server} max_fails=0;" for server in ports]
        site = site.replace("server 127.0.0.1:8000;", " ".join(servers))
        kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        temporary = " ".join(f"{kind}_temp_path {self.directory};" for kind in kinds)
        return f"""
            daemon off;
            pid {self.directory}/nginx.pid;
            error_log {self.directory}/nginx.log;
            events {{}}
            http {{ access_log off; {temporary} {site} }}"""

    def deliver(self, port):
        """Begin to send a file, and keep its name and its client."""
        number = len(self.files)
        events = write_events(self.path(f"events{number}"), 30_000, seed=number)
        url = f"http://127.0.0.1:{port}/liveEvent"
        arguments = [events, "--url", url, "--batch-size", 100]
        self.files.append(events)
        self.clients.append(self.start("client.py", *arguments, **self.SECRET))

    def delivering(self):
        """Return how many clients are at work."""
        return sum(client.poll() is None for client in self.clients)

    def test_totals_are_exact_although_servers_are_killed(self):
        servers = [Server(self, log=f"log{n}", **self.SECRET) for n in range(3)]
        port = self.balance([server.port for server in servers])
        logs = [server.log for server in servers]
        followers = [self.start("data_processor.py", "--follow", log) for log in logs]
        self.files = []
        self.clients = []
        kills = 0
        killed_at = [0, 0, 0]  # how long each log was when its server was killed

        def grown():
            """Return the numbers of the logs that have grown since then."""
            sizes = [log.stat().st_size for log in logs]
            return [n for n in range(3) if sizes[n] > killed_at[n] + 200_000]

        while kills < self.KILLS:
            while self.delivering() < 3:
                self.deliver(port)
            wait_until(lambda: grown() or self.delivering() < 3, "a log grows")
            for n in grown():
                servers[n].kill()
                kills += 1
                killed_at[n] = logs[n].stat().st_size
                servers[n] = Server(self, log=f"log{n}", port=servers[n].port, **self.SECRET)
        for client in self.clients:
            _, errors = client.communicate(timeout=60)
            self.assertEqual(client.returncode, 0, errors)
        for follower in followers:
            follower.terminate()
            self.assertEqual(follower.wait(20), 0)
        self.processor(*logs)
        self.assertRevenue(oracle(*self.files))
        self.processor("--verify", *logs)

"""Who measures what: every genotype is claimed before it is measured, by one worker, whose lease it renews.

Two tables beside Optuna's. A worker that is killed renews nothing: after `LEASE_S`, or at once on its own machine, its
claims are anybody's. (Optuna's heartbeats are none: they exist for `study.optimize` alone, and fail trials that live.)
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import uuid
from collections.abc import Sequence
from pathlib import Path

import sqlalchemy
from sqlalchemy import BigInteger, Column, Connection, Float, Integer, String, Table

from ens.pareto.trials import Trials, read_clock
from ens.space import Genotype, format_genotype

LEASE_S = 60.0
"""How long a worker may say nothing before its claims are taken over; it renews them three times as often."""

_META = sqlalchemy.MetaData()
_WORKERS = Table("ens_workers", _META, Column("worker_id", String(32), primary_key=True), Column("study_id", Integer),
                 Column("name", String(255)), Column("machine", String(255)), Column("pid", BigInteger),
                 Column("expires_s", Float(53)))
_CLAIMS = Table("ens_claims", _META, Column("study_id", Integer, primary_key=True, autoincrement=False),
                Column("genotype", String(512), primary_key=True), Column("worker_id", String(32)),
                Column("started_s", Float(53)))


class Claims:
    """The claims on genotypes of one study, and the worker that this process is; made after `create_tables`.

    `begin` renews the lease in a thread until `end`. What takes a connection is part of a transaction of `trials`.
    """

    def __init__(self, trials: Trials) -> None:
        self._trials = trials
        self._machine = _describe_machine()
        self._worker_id = uuid.uuid4().hex  # a database may give the number of a row that is gone again
        self._ended = threading.Event()
        self._renewing: threading.Thread | None = None
        self.name = f"{socket.gethostname()}:{os.getpid()}"

    def read(self, connection: Connection) -> tuple[list[str], list[str], list[str], int]:
        """Genotypes claimed by this worker, by others and by the dead, and the number of workers."""
        others = {worker_id for worker_id, dead in self._list_workers(connection) if not dead} - {self._worker_id}
        claims = connection.execute(sqlalchemy.select(_CLAIMS.c.genotype, _CLAIMS.c.worker_id)
                                    .where(_CLAIMS.c.study_id == self._trials.study_id)).all()
        return ([genotype for genotype, worker_id in claims if worker_id == self._worker_id],
                [genotype for genotype, worker_id in claims if worker_id in others],
                [genotype for genotype, worker_id in claims if worker_id not in {*others, self._worker_id}],
                1 + len(others))

    def add(self, connection: Connection, genotypes: Sequence[Genotype]) -> None:
        """Claim genotypes that no other live worker has, until they are removed."""
        dead = [worker_id for worker_id, is_dead in self._list_workers(connection) if is_dead]
        connection.execute(_WORKERS.delete().where(_WORKERS.c.worker_id.in_(dead)))
        now_s, study_id = read_clock(connection), self._trials.study_id
        if not self._renew(connection, now_s):
            connection.execute(_WORKERS.insert().values(
                worker_id=self._worker_id, study_id=study_id, name=self.name, machine=self._machine, pid=os.getpid(),
                expires_s=now_s + LEASE_S))
        for genotype in map(format_genotype, genotypes):
            self.remove(connection, genotype)  # that of a dead worker
            connection.execute(_CLAIMS.insert().values(study_id=study_id, genotype=genotype,
                                                       worker_id=self._worker_id, started_s=now_s))
        if self._renewing is None:
            self._renewing = threading.Thread(target=self._keep_renewing, daemon=True)
            self._renewing.start()

    def remove(self, connection: Connection, genotype: str) -> float | None:
        """Drop the claim on a genotype; returns when it began, None where there was none."""
        this = (_CLAIMS.c.study_id == self._trials.study_id, _CLAIMS.c.genotype == genotype)
        started_s = connection.execute(sqlalchemy.select(_CLAIMS.c.started_s).where(*this)).scalar()
        connection.execute(_CLAIMS.delete().where(*this))
        return started_s

    def end(self) -> None:
        """Give back what this worker has claimed and not measured."""
        self._ended.set()
        if self._renewing is not None:
            self._renewing.join()
            self._renewing = None
            self._trials.change(self._leave)

    def _keep_renewing(self) -> None:
        while not self._ended.wait(LEASE_S / 3):
            try:
                self._trials.change(lambda connection: self._renew(connection, read_clock(connection)))
            except sqlalchemy.exc.SQLAlchemyError:
                continue  # the server may be back next time; who is taken for dead meanwhile claims anew

    def _renew(self, connection: Connection, now_s: float) -> bool:
        """Whether this worker is still known; False after it was taken for dead."""
        renewed = connection.execute(_WORKERS.update().values(expires_s=now_s + LEASE_S)
                                     .where(_WORKERS.c.worker_id == self._worker_id))
        return renewed.rowcount == 1

    def _leave(self, connection: Connection) -> None:
        for table in (_CLAIMS, _WORKERS):
            connection.execute(table.delete().where(table.c.worker_id == self._worker_id))

    def _list_workers(self, connection: Connection) -> list[tuple[str, bool]]:
        """Every worker of the study, and whether it is dead."""
        now_s = read_clock(connection)
        rows = connection.execute(sqlalchemy.select(_WORKERS.c.worker_id, _WORKERS.c.machine, _WORKERS.c.pid,
                                                    _WORKERS.c.expires_s)
                                  .where(_WORKERS.c.study_id == self._trials.study_id))
        return [(worker_id, expires_s < now_s or (machine == self._machine and not _is_alive(pid)))
                for worker_id, machine, pid, expires_s in rows]


def create_tables(engine: sqlalchemy.Engine) -> None:
    """Make the tables of claims where they are missing; nobody else may do so meanwhile."""
    _META.create_all(engine)


def _describe_machine() -> str:
    """What processes have in common that see each other's process numbers: the boot of a system, and a container."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _is_alive(pid: int) -> bool:
    """Whether a process of this machine runs; where that cannot be told, its lease will."""
    if sys.platform == "win32":
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True

"""The contract of `PersistenceAdapter` as tests; a plugin's test file is a subclass.

    from expbuf_core.testing import PersistenceSuite

    class TestMyStorage(PersistenceSuite):
        provider = "my_storage"

Every behaviour has a number, which stays for ever (`docs/plugins.md`). Only a capability that the
provider does not declare skips a test, and what cannot be played where its library writes to the
disk by itself. What is stored is also read, cut and changed behind the adapter's back
(`stored_files`), so that the code under test never checks itself.
"""

from __future__ import annotations

from expbuf_core.testing.persistence_appending import Appending
from expbuf_core.testing.persistence_everywhere import Everywhere, WholeBuffers
from expbuf_core.testing.persistence_reading import Reading
from expbuf_core.testing.persistence_recovering import Recovering
from expbuf_core.testing.persistence_upkeep import Upkeep


class PersistenceSuite(Recovering, Appending, Reading, Upkeep, Everywhere, WholeBuffers):
    """What every storage backend must do.

    Attributes:
        provider: The backend's name, or its `PersistenceProvider`.
        settings: Its section of the configuration. Small files make the tests harder.
        writes_through_fs: False for a backend whose library writes to the disk by itself. Power
            losses are the backend's own tests then; so are failing disks, unless it plays them by
            overriding `each_failure`, `failing_sync` and `full_disk`.
        appears_whole: True for a backend that gives each append files of its own, renamed into
            place: such a file is never torn, so it is damage where it is cut.
        many: How many operations make a long log in P2; fewer where each costs a sync.
        crash_states: How many folders that a power loss could have left are tried in P14.
        flips: How many bytes are changed, one at a time, in P2.
        steady_growth: P32: by how much the folder may grow while the buffer stays the same.
    """

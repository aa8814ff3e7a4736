//! Teams, members, API keys, and what platform admins see.

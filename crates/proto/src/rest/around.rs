//! Audit log, notification channels, usage.

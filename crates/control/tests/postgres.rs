//! Every suite a second time, on PostgreSQL: `common` picks the database by this binary's name.
#![expect(
    clippy::duplicate_mod,
    reason = "each suite brings its own `common`, as it does when it is a binary by itself"
)]

#[path = "accounts.rs"]
mod accounts;
#[path = "api.rs"]
mod api;
#[path = "around.rs"]
mod around;
#[path = "audit.rs"]
mod audit;
#[path = "authorisation.rs"]
mod authorisation;
#[path = "deletion.rs"]
mod deletion;
#[path = "events.rs"]
mod events;
#[path = "hosts.rs"]
mod hosts;
#[path = "input.rs"]
mod input;
#[path = "lifecycle.rs"]
mod lifecycle;
#[path = "metrics.rs"]
mod metrics;
#[path = "sockets.rs"]
mod sockets;
#[path = "teams.rs"]
mod teams;

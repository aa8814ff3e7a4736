//! What the methods of [`Services`] take and return.
//!
//! `Services` is the business logic that the built-in API stands on. Its methods decide, check and record as a
//! request to the API would; whoever calls them has authenticated the caller (see the extractors in
//! [`extension`](crate::extension)) and passes on who it is:
//!
//! - a [`Principal`] touches a team's things: sandboxes, templates, processes, files;
//! - a [`Session`] is a person with a role, who manages members, keys and channels;
//! - methods that take a [`TeamId`](crate::domain::TeamId) alone, and passes, ask nobody: they are for background work;
//! - those of operators (`create_team`, `create_user`, `set_password`, `issue_host_token`, …) ask nobody either, and are
//!   in the audit log as the command line's.
//!
//! What happens is heard through [`Extension::on_event`](crate::extension::Extension::on_event); what an extension does
//! by itself it writes into the log with `Services::audit`.
//!
//! Failures are [`Error`](crate::Error)s with the stable codes of the API; those of the database say
//! `database_unavailable` or `internal_error`, and leave the cause to the log.
//!
//! Wire types of the API that some methods share with it are in [`rest`].

pub use wrenn_proto::{hostagent, rest};

pub use crate::domain::around::{AuditActor, AuditEntry, Channel, ChannelEvent};
pub use crate::domain::lifecycle::Request;
pub use crate::domain::metrics::MetricPoint;
pub use crate::domain::team::{ApiKey, Member, Team};
pub use crate::domain::{
    Actor, Host, HostDeletion, HostOwner, HostStatus, Principal, Role, Sandbox, Session, Template,
};
pub use crate::service::Services;
pub use crate::service::audit::ListAudit;
pub use crate::service::bootstrap::HostToken;
pub use crate::service::channels::ShownChannel;
pub use crate::service::files::{FileStream, FileTarget};
pub use crate::service::host_management::NewHostToken;
pub use crate::service::processes::{
    ExecOutcome, Input, ProcessEvent, ProcessHandle, ProcessStream, Selector, Spec,
};
pub use crate::service::sandbox_metrics::MetricsRange;
pub use crate::service::sandboxes::{Accepted, ListSandboxes};
pub use crate::service::usage::{DayUse, Range, TeamStats};
pub use crate::store::{AuditFilter, Held};

//! People's accounts.

use super::UserId;

/// Whether an account can be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UserStatus {
    /// Waits for the link in its mail.
    Inactive,
    /// In use.
    Active,
    /// Closed by a platform admin; the links of mails do not open it again.
    Disabled,
}

impl UserStatus {
    /// The word in the database and on the wire.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Inactive => "inactive",
            Self::Active => "active",
            Self::Disabled => "disabled",
        }
    }

    /// The status of a word. What this version does not know is closed.
    #[must_use]
    pub fn parse(word: &str) -> Self {
        match word {
            "inactive" => Self::Inactive,
            "active" => Self::Active,
            _ => Self::Disabled,
        }
    }
}

/// An account, as the services that let people in need it.
#[derive(Clone, PartialEq, Eq)]
pub struct Account {
    /// Its id.
    pub id: UserId,
    /// Lower case.
    pub email: String,
    /// What others see.
    pub name: String,
    /// Whether it can be used.
    pub status: UserStatus,
    /// Argon2id in PHC form; absent when the login goes through a provider.
    pub password_hash: Option<String>,
    /// Raised by whatever ends all sessions.
    pub session_version: i32,
    /// Whether the address is known to be its owner's.
    pub email_verified: bool,
    /// Whether they administer the platform.
    pub platform_admin: bool,
}

impl std::fmt::Debug for Account {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // The hash stays out of logs.
        f.debug_struct("Account")
            .field("id", &self.id)
            .field("status", &self.status)
            .finish_non_exhaustive()
    }
}

/// What a token in a mail is good for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MailPurpose {
    /// Activates an account.
    Activate,
    /// Sets a new password.
    Reset,
}

impl MailPurpose {
    /// The word in the database.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Activate => "activate",
            Self::Reset => "reset",
        }
    }
}

//! Accounts: sign-up, sessions, a person's own data.

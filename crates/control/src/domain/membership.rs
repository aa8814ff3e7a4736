//! Who may change whose place in a team, without IO.
//!
//! Owners are protected: only an owner touches an owner or makes one, and a team never loses its last one. Nobody
//! gives a role above their own. The store reads the roles under the team's lock and asks here, so the
//! answer still holds when it is written.

use super::Role;

/// What somebody wants to do to a member, or to a team as one of its members.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MemberChange {
    /// Bring in somebody new, as a member.
    Add,
    /// Give another role.
    SetRole(Role),
    /// Remove somebody else, or oneself.
    Remove,
    /// Go.
    Leave,
}

/// Why not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refused {
    /// The acting user is not in the team (any more): to them it does not exist.
    NotInTeam,
    /// Only admins and owners manage members.
    NeedsAdmin,
    /// Only owners touch owners, and make them.
    NeedsOwner,
    /// The target is not in the team.
    NoSuchMember,
    /// The target is in the team already.
    AlreadyMember,
    /// The team would be without an owner.
    LastOwner,
}

/// The people concerned, read under the team's lock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Situation {
    /// The role of who acts.
    pub actor: Option<Role>,
    /// The role of whom it concerns; the same as `actor` when people change their own place.
    pub target: Option<Role>,
    /// Whether both are the same person.
    pub same: bool,
    /// Owners besides the target.
    pub other_owners: u64,
}

/// Decides about a change of members.
///
/// # Errors
/// [`Refused`] says why not.
pub fn decide_member_change(situation: Situation, change: MemberChange) -> Result<(), Refused> {
    let Situation {
        actor,
        target,
        same,
        other_owners,
    } = situation;
    let actor = actor.ok_or(Refused::NotInTeam)?;
    // Everybody may go by themselves.
    let going = change == MemberChange::Leave || (same && change == MemberChange::Remove);
    if !going && actor < Role::Admin {
        return Err(Refused::NeedsAdmin);
    }
    let Some(target) = target else {
        return match change {
            MemberChange::Add => Ok(()),
            _ => Err(Refused::NoSuchMember),
        };
    };
    let after = match change {
        MemberChange::Add => return Err(Refused::AlreadyMember),
        MemberChange::SetRole(role) => Some(role),
        MemberChange::Remove | MemberChange::Leave => None,
    };
    let owners_only = target == Role::Owner || after == Some(Role::Owner);
    if owners_only && actor < Role::Owner {
        return Err(Refused::NeedsOwner);
    }
    if target == Role::Owner && after != Some(Role::Owner) && other_owners == 0 {
        return Err(Refused::LastOwner);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    fn role() -> impl Strategy<Value = Role> {
        proptest::sample::select(Role::ALL.to_vec())
    }

    fn change() -> impl Strategy<Value = MemberChange> {
        prop_oneof![
            Just(MemberChange::Add),
            role().prop_map(MemberChange::SetRole),
            Just(MemberChange::Remove),
            Just(MemberChange::Leave),
        ]
    }

    proptest! {
        #[test]
        fn a_team_keeps_an_owner_and_its_owners_their_protection(
            steps in proptest::collection::vec((0u8..5, 0u8..5, change()), 1..80)
        ) {
            let mut team = BTreeMap::from([(0u8, Role::Owner)]);
            for (actor, target, change) in steps {
                let target = if change == MemberChange::Leave { actor } else { target };
                let before = team.clone();
                let situation = Situation {
                    actor: team.get(&actor).copied(),
                    target: team.get(&target).copied(),
                    same: actor == target,
                    other_owners: team.iter().filter(|(who, role)| **who != target && **role == Role::Owner).count() as u64,
                };
                if decide_member_change(situation, change).is_ok() {
                    match change {
                        MemberChange::Add => { team.insert(target, Role::Member); }
                        MemberChange::SetRole(role) => { team.insert(target, role); }
                        MemberChange::Remove | MemberChange::Leave => { team.remove(&target); }
                    }
                }
                prop_assert!(team.values().any(|role| *role == Role::Owner));
                if team == before { continue; }
                let acted_as = before.get(&actor).copied().expect("somebody outside acted");
                // Only owners change owners; nobody gives more than they have; members manage nobody but themselves.
                if before.get(&target) == Some(&Role::Owner) { prop_assert_eq!(acted_as, Role::Owner); }
                if let Some(now) = team.get(&target) { prop_assert!(*now <= acted_as || now == &Role::Member); }
                if acted_as == Role::Member { prop_assert!(actor == target && !team.contains_key(&target)); }
            }
        }
    }
}

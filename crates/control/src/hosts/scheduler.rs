//! Chooses a host: round robin over the online hosts that take the team's sandboxes and have the template and the room.
//!
//! Three things count. *Memory* as the host last told it, less what is on its way there. *vCPUs*, of which
//! a host takes a multiple of its processors ([`Placement::vcpu_overcommit`]), since most sandboxes wait
//! most of the time. *Disk* beyond a reserve ([`Placement::disk_reserve_mb`]): a sandbox's disk is sparse and
//! grows with what the guest writes, so its size is no measure; what a host surely needs is room for the
//! sandbox's memory, which a pause writes there.
//!
//! The agent has the last word when it reserves: this only avoids asking in vain, and two creates at the
//! same moment may both find the last room.
//!
//! Creates share a view of the hosts that is a second old at most: their rows and the sums over all their sandboxes are
//! what grows with a fleet. In between, what this process places is counted here; what others place or end, and what is
//! just being written while the hosts are read, is seen a second later. Before a refusal, and after a host that refused,
//! they are read anew. Whether the chosen host still takes sandboxes of the template, [`Store::sandbox_insert`] asks again.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt::Write as _;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::config::Placement;
use crate::domain::{Host, HostId, Sandbox, TeamId, TemplateId};
use crate::store::{HostFacts, OnHost, Store};
use crate::{Error, ErrorCode, Result};

/// What a sandbox needs of its host.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Needs {
    /// Whose it is: other teams' own hosts do not take it.
    pub(crate) team: TeamId,
    pub(crate) template: TemplateId,
    pub(crate) vcpus: u32,
    pub(crate) memory_mb: u32,
}

impl From<&Sandbox> for Needs {
    fn from(sandbox: &Sandbox) -> Self {
        Self {
            team: sandbox.team,
            template: sandbox.template,
            vcpus: sandbox.vcpus,
            memory_mb: sandbox.memory_mb,
        }
    }
}

/// How old a view of the hosts may be.
const VIEW_AGE: Duration = Duration::from_secs(1);

/// The scheduler.
#[derive(Debug, Default)]
pub(crate) struct Scheduler {
    view: Mutex<View>,
    /// Held while the hosts are read: of many creates at once, one reads for all.
    reading: tokio::sync::Mutex<()>,
}

/// The hosts as they were read last.
#[derive(Debug, Default)]
struct View {
    /// Those that take sandboxes.
    hosts: BTreeMap<HostId, (Host, OnHost)>,
    /// When they began to be read.
    read_at: Option<Instant>,
    /// Where templates are ready, and when that began to be read.
    holders: HashMap<TemplateId, (Instant, HashSet<HostId>)>,
    /// Whose turn it is.
    next: usize,
}

impl Scheduler {
    /// A host for a new sandbox, other than those that just refused it or turned out to be gone.
    pub(crate) async fn place(
        &self,
        store: &Store,
        placement: &Placement,
        needs: Needs,
        refused: &[HostId],
    ) -> Result<HostId> {
        let asked_at = Instant::now();
        // A refusal says that the view was wrong.
        let recent = asked_at.checked_sub(VIEW_AGE).filter(|_| refused.is_empty());
        let mut since = recent.unwrap_or(asked_at);
        loop {
            self.read(store, needs.template, since).await?;
            match self.view().place(placement, needs, refused) {
                Err(_) if since < asked_at => since = asked_at,
                decided => return decided,
            }
        }
    }

    /// A host told what it has: what is placed next need not wait for the next reading.
    pub(crate) fn heard(&self, host: HostId, facts: &HostFacts<'_>) {
        if let Some((host, _)) = self.view().hosts.get_mut(&host) {
            host.cpu_cores = facts.cpu_cores.unwrap_or(host.cpu_cores);
            host.memory_mb = facts.memory_mb.unwrap_or(host.memory_mb);
            host.memory_available_mb = facts.memory_available_mb;
            host.disk_available_mb = facts.disk_available_mb;
        }
    }

    /// Reads what was not read since a moment.
    async fn read(&self, store: &Store, template: TemplateId, since: Instant) -> Result<()> {
        if self.view().known(template, since) == (true, true) {
            return Ok(());
        }
        // A statement whose answer does not come holds up its own create alone: the others read for themselves then.
        let _reading = tokio::time::timeout(VIEW_AGE, self.reading.lock()).await;
        let (hosts_known, holders_known) = self.view().known(template, since);
        let began = Instant::now();
        let hosts = async {
            match hosts_known {
                true => Ok(None),
                false => store.hosts_for_placement().await.map(Some),
            }
        };
        let holders = async {
            match holders_known {
                true => Ok(None),
                false => store.hosts_with_template(template).await.map(Some),
            }
        };
        let (hosts, holders) = tokio::try_join!(hosts, holders)?;
        let mut view = self.view();
        if let Some(hosts) = hosts
            && view.read_at.is_none_or(|read_at| read_at < began)
        {
            view.hosts = hosts
                .into_iter()
                .map(|(host, held)| (host.id, (host, held)))
                .collect();
            view.read_at = Some(began);
        }
        if let Some(holders) = holders
            && view
                .holders
                .get(&template)
                .is_none_or(|(read_at, _)| *read_at < began)
        {
            view.holders
                .retain(|_, (read_at, _)| began.saturating_duration_since(*read_at) < VIEW_AGE);
            view.holders.insert(template, (began, holders));
        }
        Ok(())
    }

    fn view(&self) -> MutexGuard<'_, View> {
        self.view.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl View {
    /// Whether the hosts, and those of a template, were read since a moment.
    fn known(&self, template: TemplateId, since: Instant) -> (bool, bool) {
        let hosts = self.read_at.is_some_and(|read_at| read_at >= since);
        let holders = self
            .holders
            .get(&template)
            .is_some_and(|(read_at, _)| *read_at >= since);
        (hosts, holders)
    }

    /// Chooses a host, and counts there what it will hold.
    fn place(&mut self, placement: &Placement, needs: Needs, refused: &[HostId]) -> Result<HostId> {
        let holders = self.holders.get(&needs.template).map(|(_, holders)| holders);
        let mut candidates: Vec<_> = self
            .hosts
            .values_mut()
            .filter(|(host, _)| {
                holders.is_some_and(|holders| holders.contains(&host.id))
                    && host.owner.serves(needs.team)
                    && !refused.contains(&host.id)
            })
            .collect();
        if candidates.is_empty() {
            return Err(Error::new(
                ErrorCode::NoCapacity,
                "no host that has the template is online; try again shortly",
            ));
        }
        let rooms: Vec<Room> = candidates
            .iter()
            .map(|(host, held)| Room::of(host, *held, placement))
            .collect();
        let asked = Amounts::of(needs);
        match choose(&rooms, asked, self.next) {
            Ok(chosen) => {
                self.next = self.next.wrapping_add(1);
                let (host, held) = candidates
                    .get_mut(chosen)
                    .ok_or_else(|| Error::internal("the scheduler chose a host that is none"))?;
                held.vcpus = held.vcpus.saturating_add(needs.vcpus.into());
                held.arriving_mb = held.arriving_mb.saturating_add(needs.memory_mb.into());
                Ok(host.id)
            }
            Err(lack) => Err(Error::new(
                ErrorCode::NoCapacity,
                lack.message(asked, &rooms, placement),
            )),
        }
    }
}

/// What is counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Resource {
    Vcpus,
    Memory,
    Disk,
}

impl Resource {
    const ALL: [Self; 3] = [Self::Vcpus, Self::Memory, Self::Disk];
}

/// How much of each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Amounts {
    vcpus: u64,
    memory_mb: u64,
    disk_mb: u64,
}

impl Amounts {
    fn of(needs: Needs) -> Self {
        Self {
            vcpus: needs.vcpus.into(),
            memory_mb: needs.memory_mb.into(),
            disk_mb: needs.memory_mb.into(),
        }
    }

    fn get(self, resource: Resource) -> u64 {
        match resource {
            Resource::Vcpus => self.vcpus,
            Resource::Memory => self.memory_mb,
            Resource::Disk => self.disk_mb,
        }
    }

    fn hold(self, asked: Self) -> bool {
        Resource::ALL
            .iter()
            .all(|resource| self.get(*resource) >= asked.get(*resource))
    }
}

/// A host's room: now, and when nothing else is there.
#[derive(Debug, Clone, Copy)]
struct Room {
    free: Amounts,
    whole: Amounts,
}

impl Room {
    fn of(host: &Host, held: OnHost, placement: &Placement) -> Self {
        let vcpus = u64::from(host.cpu_cores.max(1)) * u64::from(placement.vcpu_overcommit.max(1));
        let beyond_reserve = |disk_mb: u64| disk_mb.saturating_sub(placement.disk_reserve_mb);
        let disk_mb = host.disk_gb.saturating_mul(1024).max(host.disk_available_mb);
        Self {
            free: Amounts {
                vcpus: vcpus.saturating_sub(held.vcpus),
                memory_mb: host.memory_available_mb.saturating_sub(held.arriving_mb),
                disk_mb: beyond_reserve(host.disk_available_mb.saturating_sub(held.arriving_mb)),
            },
            whole: Amounts {
                vcpus,
                memory_mb: host.memory_mb.max(host.memory_available_mb),
                disk_mb: beyond_reserve(disk_mb),
            },
        }
    }
}

/// Why no host was chosen.
#[derive(Debug, PartialEq, Eq)]
enum Lack {
    /// No host is that large, however empty.
    Never(Vec<Resource>),
    /// No host has that much of these now.
    Now(Vec<Resource>),
    /// Each is there on some host, but not all on one.
    Together,
}

/// The first host with room, going round from `start`.
fn choose(rooms: &[Room], asked: Amounts, start: usize) -> Result<usize, Lack> {
    let count = rooms.len().max(1);
    let first = start % count;
    let found = (0..rooms.len())
        .map(|offset| (first + offset) % count)
        .find(|at| rooms.get(*at).is_some_and(|room| room.free.hold(asked)));
    if let Some(found) = found {
        return Ok(found);
    }
    let short = |part: fn(&Room) -> Amounts| -> Vec<Resource> {
        Resource::ALL
            .into_iter()
            .filter(|resource| most(rooms, *resource, part) < asked.get(*resource))
            .collect()
    };
    let never = short(|room| room.whole);
    if !never.is_empty() {
        return Err(Lack::Never(never));
    }
    let now = short(|room| room.free);
    Err(if now.is_empty() {
        Lack::Together
    } else {
        Lack::Now(now)
    })
}

fn most(rooms: &[Room], resource: Resource, part: fn(&Room) -> Amounts) -> u64 {
    rooms
        .iter()
        .map(|room| part(room).get(resource))
        .max()
        .unwrap_or_default()
}

impl Lack {
    /// In words, with what would help.
    fn message(&self, asked: Amounts, rooms: &[Room], placement: &Placement) -> String {
        let amount = |resource: Resource| {
            let value = asked.get(resource);
            match resource {
                Resource::Vcpus => format!("{value} vCPUs"),
                Resource::Memory => format!("{value} MiB of memory"),
                Resource::Disk => format!(
                    "{value} MiB of disk, which the memory of a paused sandbox takes, beyond the reserve of {} MiB",
                    placement.disk_reserve_mb
                ),
            }
        };
        let each = |resources: &[Resource], part: fn(&Room) -> Amounts| {
            let mut text = String::new();
            for resource in resources {
                let separator = if text.is_empty() { "" } else { ", nor " };
                let most = most(rooms, *resource, part);
                // Writing to a string cannot fail.
                let _ = write!(
                    text,
                    "{separator}{} (the most on one host is {most})",
                    amount(*resource)
                );
            }
            text
        };
        match self {
            Self::Never(resources) => format!(
                "no host that is online is large enough for {}; ask for less, or add a larger host",
                each(resources, |room| room.whole)
            ),
            Self::Now(resources) => format!(
                "no host has {} free; destroy or pause sandboxes, ask for less, or add a host",
                each(resources, |room| room.free)
            ),
            Self::Together => format!(
                "no host has {} vCPUs, {} MiB of memory and {} MiB of disk free at the same time; destroy or pause \
                 sandboxes, ask for less, or add a host",
                asked.vcpus, asked.memory_mb, asked.disk_mb
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::domain::{HostOwner, HostStatus};

    fn amounts(vcpus: u64, memory_mb: u64, disk_mb: u64) -> Amounts {
        Amounts {
            vcpus,
            memory_mb,
            disk_mb,
        }
    }

    fn host() -> Host {
        Host {
            version: String::new(),
            id: HostId::new(),
            owner: HostOwner::Platform,
            provider: None,
            availability_zone: None,
            status: HostStatus::Online,
            deletion: None,
            arch: String::new(),
            address: String::new(),
            rpc_token: String::new(),
            cpu_cores: 4,
            memory_mb: 8192,
            disk_gb: 100,
            memory_available_mb: 6000,
            disk_available_mb: 50_000,
            last_heartbeat_at: None,
            created_at: 0,
        }
    }

    #[test]
    fn a_hosts_room_is_what_it_told_less_what_is_held_and_kept() {
        let placement = Placement {
            vcpu_overcommit: 8,
            disk_reserve_mb: 2048,
        };
        let held = OnHost {
            vcpus: 30,
            arriving_mb: 512,
        };
        let room = Room::of(&host(), held, &placement);
        assert_eq!(room.free, amounts(2, 5488, 50_000 - 512 - 2048));
        assert_eq!(room.whole, amounts(32, 8192, 102_400 - 2048));
        // More than there is held, and a disk below its reserve: nothing, not a number below it.
        let mut full = host();
        full.disk_available_mb = 100;
        let held = OnHost {
            vcpus: 33,
            arriving_mb: 7000,
        };
        assert_eq!(Room::of(&full, held, &placement).free, amounts(0, 0, 0));
    }

    #[test]
    fn what_a_view_has_placed_counts_until_it_is_read_again() {
        let (template, team) = (TemplateId::new(), TeamId::new());
        let place = |view: &mut View, needs: Needs, refused: &[HostId]| {
            let placement = Placement {
                vcpu_overcommit: 1,
                disk_reserve_mb: 0,
            };
            view.place(&placement, needs, refused)
        };
        let of = |owner: HostOwner| {
            let host = Host { owner, ..host() };
            (host.id, (host, OnHost::default()))
        };
        let hosts = BTreeMap::from([
            of(HostOwner::Platform),
            of(HostOwner::Platform),
            of(HostOwner::Team(team)),
            of(HostOwner::Team(TeamId::new())),
        ]);
        let may: HashSet<HostId> = hosts
            .values()
            .filter(|(host, _)| host.owner.serves(team))
            .map(|(host, _)| host.id)
            .collect();
        let now = Instant::now();
        let mut view = View {
            holders: HashMap::from([(template, (now, hosts.keys().copied().collect()))]),
            hosts,
            read_at: Some(now),
            next: 0,
        };
        let needs = Needs {
            team,
            template,
            vcpus: 2,
            memory_mb: 3000,
        };
        // Four processors and 6000 MiB: two on each of the three that take the team's.
        let mut chosen: Vec<HostId> = (0..6)
            .map(|_| place(&mut view, needs, &[]).expect("there is room"))
            .collect();
        assert_eq!(
            place(&mut view, needs, &[]).map_err(|error| error.code),
            Err(ErrorCode::NoCapacity)
        );
        chosen.sort_unstable();
        assert!(chosen.chunks(2).all(|pair| pair[0] == pair[1]), "{chosen:?}");
        assert_eq!(chosen.iter().copied().collect::<HashSet<_>>(), may);
        // What is smaller than the least, but not where it was refused.
        let least = Needs {
            vcpus: 0,
            memory_mb: 0,
            ..needs
        };
        let refused: Vec<HostId> = may.iter().copied().skip(1).collect();
        let left = place(&mut view, least, &refused).expect("there is room");
        assert!(may.contains(&left) && !refused.contains(&left));
        // Only where the template is.
        let elsewhere = Needs {
            template: TemplateId::new(),
            ..least
        };
        assert!(place(&mut view, elsewhere, &[]).is_err());
    }

    #[test]
    fn what_lacks_is_named_with_what_there_is() {
        let rooms = [
            Room {
                free: amounts(2, 4000, 900),
                whole: amounts(32, 8192, 9000),
            },
            Room {
                free: amounts(8, 300, 100),
                whole: amounts(16, 4096, 9000),
            },
        ];
        let told = |vcpus, memory_mb, disk_mb| {
            let asked = amounts(vcpus, memory_mb, disk_mb);
            let lack = choose(&rooms, asked, 0).expect_err("no room");
            lack.message(asked, &rooms, &Placement::default())
        };
        let message = told(33, 512, 512);
        assert!(
            message.contains("33 vCPUs (the most on one host is 32)") && message.contains("large enough"),
            "{message}"
        );
        assert!(!message.contains("memory"), "{message}");
        let message = told(9, 5000, 512);
        assert!(
            message.contains("9 vCPUs (the most on one host is 8)")
                && message.contains("5000 MiB of memory (the most on one host is 4000)")
                && !message.contains("disk"),
            "{message}"
        );
        let message = told(1, 100, 1000);
        assert!(
            message.contains("1000 MiB of disk") && message.contains("is 900)"),
            "{message}"
        );
        let message = told(4, 512, 512);
        assert!(message.contains("at the same time"), "{message}");
    }

    fn any_amounts() -> impl Strategy<Value = Amounts> {
        (0u64..6, 0u64..6, 0u64..6).prop_map(|(vcpus, memory, disk)| amounts(vcpus, memory, disk))
    }

    fn any_room() -> impl Strategy<Value = Room> {
        (any_amounts(), any_amounts()).prop_map(|(free, more)| Room {
            free,
            whole: amounts(
                free.vcpus + more.vcpus,
                free.memory_mb + more.memory_mb,
                free.disk_mb + more.disk_mb,
            ),
        })
    }

    proptest! {
        #[test]
        fn a_host_is_chosen_exactly_if_one_has_room(
            rooms in proptest::collection::vec(any_room(), 0..6), asked in any_amounts(), start in any::<usize>(),
        ) {
            let fit = |room: &Room| {
                room.free.vcpus >= asked.vcpus
                    && room.free.memory_mb >= asked.memory_mb
                    && room.free.disk_mb >= asked.disk_mb
            };
            match choose(&rooms, asked, start) {
                Ok(chosen) => {
                    prop_assert!(fit(&rooms[chosen]));
                    // The first of them, going round.
                    let mut at = start % rooms.len();
                    while at != chosen {
                        prop_assert!(!fit(&rooms[at]));
                        at = (at + 1) % rooms.len();
                    }
                }
                Err(lack) => {
                    prop_assert!(!rooms.iter().any(fit));
                    let short = |resource: Resource, part: fn(&Room) -> Amounts| {
                        rooms.iter().all(|room| part(room).get(resource) < asked.get(resource))
                    };
                    let all_short = |part: fn(&Room) -> Amounts| -> Vec<Resource> {
                        Resource::ALL
                            .into_iter()
                            .filter(|resource| !rooms.is_empty() && short(*resource, part))
                            .collect()
                    };
                    if !rooms.is_empty() {
                        let (never, now) = (all_short(|room| room.whole), all_short(|room| room.free));
                        let expected = if !never.is_empty() {
                            Lack::Never(never)
                        } else if !now.is_empty() {
                            Lack::Now(now)
                        } else {
                            Lack::Together
                        };
                        prop_assert_eq!(lack, expected);
                    }
                }
            }
        }

        #[test]
        fn each_host_has_its_turn(count in 1usize..6, start in 0usize..100) {
            let room = Room { free: amounts(1, 1, 1), whole: amounts(1, 1, 1) };
            let rooms = vec![room; count];
            let mut chosen: Vec<usize> = (start..start + count)
                .filter_map(|start| choose(&rooms, amounts(1, 1, 1), start).ok())
                .collect();
            chosen.sort_unstable();
            prop_assert_eq!(chosen, (0..count).collect::<Vec<_>>());
        }
    }
}

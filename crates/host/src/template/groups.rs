//! Which process may read which image. Under a root agent each template made of a sandbox has a group of its own, and a
//! VM's process is in the groups of just those that it stands on: who escapes from a guest into its VMM finds no other
//! team's memory and disk. The owner of an image's folder is where its group is kept, so there is no list that could
//! disagree. The built-in template's images hold nothing of anybody and stay with the group of all VMs.

use std::collections::HashSet;
use std::ops::Range;
use std::os::unix::fs::{MetadataExt as _, chown};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use wrenn_proto::id::{TeamId, TemplateId};

use super::store::children;
use crate::error::{HostError, IoContext as _, Result};
use crate::layout::{ImageDir, Layout};
use crate::vmm::VmIds;

/// The groups of this host's templates.
#[derive(Debug)]
pub(super) struct Groups {
    range: Range<u32>,
    next: Mutex<Next>,
}

/// Where the search for a free group goes on. An image that is being made shows its group only once it is in place, so
/// numbers are not given again until all others have been.
#[derive(Debug)]
struct Next {
    group: u32,
    /// All behind it are free.
    fresh: bool,
}

impl Groups {
    /// Reads which groups are taken, and gives one to the templates of earlier versions, which had that of all VMs. A
    /// VM that runs on such an image has its files open and needs no way to them.
    pub(super) fn assign(layout: &Layout, ids: VmIds) -> Self {
        let groups = Self::after(ids.template_gids(), &taken(layout));
        for path in images(layout) {
            let outcome = group_of(&path).and_then(|group| {
                if group != ids.gid {
                    return Ok(());
                }
                let (image, group) = (ImageDir::new(path.clone()), groups.take(layout)?);
                // The folder last: it says that the others are done.
                for part in [image.memory(), image.disk(), path.clone()] {
                    chown(&part, None, Some(group)).at("protect", &part)?;
                }
                Ok(())
            });
            if let Err(error) = outcome {
                tracing::warn!(image = %path.display(), %error, "an image stays readable for all virtual machines");
            }
        }
        groups
    }

    /// Begins behind the highest group that is taken.
    fn after(range: Range<u32>, taken: &HashSet<u32>) -> Self {
        let highest = taken.iter().filter(|group| range.contains(group)).max();
        Self {
            next: Mutex::new(Next {
                group: highest.map_or(range.start, |group| group + 1),
                fresh: true,
            }),
            range,
        }
    }

    /// A group that no template has.
    pub(super) fn take(&self, layout: &Layout) -> Result<u32> {
        self.take_beside(|| taken(layout)).ok_or_else(|| {
            HostError::NoCapacity(format!(
                "this host has {} templates, the most that it can keep apart; delete some",
                self.range.len()
            ))
        })
    }

    fn take_beside(&self, taken: impl Fn() -> HashSet<u32>) -> Option<u32> {
        let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
        next.fresh &= self.range.contains(&next.group);
        // Nearly always nobody has to look.
        let group = if next.fresh {
            next.group
        } else {
            let taken = taken();
            (next.group..self.range.end)
                .chain(self.range.clone())
                .find(|group| !taken.contains(group))?
        };
        next.group = group + 1;
        Some(group)
    }

    /// The group that is needed to read the image at `path`, if it is a template's own.
    pub(super) fn of(&self, path: &Path) -> Result<Option<u32>> {
        Ok(Some(group_of(path)?).filter(|group| self.range.contains(group)))
    }
}

fn group_of(path: &Path) -> Result<u32> {
    Ok(std::fs::metadata(path).at("look at", path)?.gid())
}

fn taken(layout: &Layout) -> HashSet<u32> {
    images(layout)
        .iter()
        .filter_map(|path| group_of(path).ok())
        .collect()
}

/// All images but those of the built-in template.
fn images(layout: &Layout) -> Vec<PathBuf> {
    let minimal = layout.template(TeamId::PLATFORM, TemplateId::MINIMAL);
    children(&layout.team_images())
        .iter()
        .flat_map(|team| children(team))
        .filter(|template| *template != minimal)
        .flat_map(|template| children(&template))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_two_templates_get_one_group() {
        let groups = Groups::after(10..14, &HashSet::from([3, 11]));
        let taken = || HashSet::from([3, 11, 12]);
        // Behind the highest as long as there are any, then those between; 12 is in place by then, 13 is still made.
        assert_eq!(groups.take_beside(|| panic!("nobody has to look")), Some(12));
        assert_eq!(groups.take_beside(|| panic!("nobody has to look")), Some(13));
        assert_eq!(groups.take_beside(taken), Some(10));
        let all = || (10..14).collect();
        assert_eq!(groups.take_beside(all), None);
        // 11 was deleted, and its number is the next.
        assert_eq!(groups.take_beside(|| HashSet::from([10, 12, 13])), Some(11));
    }

    #[test]
    fn images_of_earlier_versions_get_a_group_and_keep_it() {
        if !rustix::process::geteuid().is_root() {
            // Only root gives files away, and only its VM processes are other users.
            return;
        }
        let root = tempfile::tempdir().unwrap();
        let layout = Layout::create(&root.path().join("data"), &root.path().join("cache")).unwrap();
        let ids = VmIds {
            gid: 900_000,
            first_uid: 900_000,
            first_template_gid: 1_000_000,
        };
        let image = |team: u128, template: u128, name: &str| {
            let id = uuid::Uuid::from_u128;
            let dir = layout
                .template(TeamId(id(team)), TemplateId(id(template)))
                .join(name);
            std::fs::create_dir_all(&dir).unwrap();
            let image = ImageDir::new(dir.clone());
            for path in [image.memory(), image.disk(), dir.clone()] {
                if path != dir {
                    std::fs::write(&path, "image").unwrap();
                }
                chown(&path, None, Some(ids.gid)).unwrap();
            }
            image
        };
        let (minimal, one, other) = (image(0, 0, "1x512-k"), image(1, 7, "image"), image(0, 8, "image"));
        let group = |path: PathBuf| std::fs::metadata(path).unwrap().gid();
        let seen = || {
            let groups = Groups::assign(&layout, ids);
            for image in [&minimal, &one, &other] {
                let folder = group(image.path().into());
                assert_eq!([group(image.memory()), group(image.disk())], [folder; 2]);
            }
            let seen = [&one, &other].map(|image| groups.of(image.path()).unwrap().unwrap());
            assert_eq!(groups.of(minimal.path()).unwrap(), None);
            assert_eq!(groups.take(&layout).unwrap(), 1_000_002);
            seen
        };
        let first = seen();
        let mut sorted = first;
        sorted.sort_unstable();
        assert_eq!(sorted, [1_000_000, 1_000_001]);
        assert_eq!(seen(), first);
    }
}

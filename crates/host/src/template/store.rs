//! The images on this host: finding them, making them when they are missing, and removing them once nothing needs them.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::SystemTime;

use serde::{Deserialize, Serialize};
use sha2::Digest as _;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use wrenn_proto::id::{TeamId, TemplateId};

use super::boot::{BootPlan, freeze, kernel_settings};
use super::groups::Groups;
use super::rootfs::Recipe;
use super::{BuildState, DebianMirror, ENVD, Kernel, Progress, fingerprint, rootfs};
use crate::error::{HostError, IoContext as _, Result};
use crate::layout::{ImageDir, Layout, WorkDir};
use crate::manager::slots::Slots;
use crate::vmm::qemu::Qemu;
use crate::vmm::{Platform, Shape};

/// Images of the built-in template that are kept in other shapes than the usual one, beside those that sandboxes stand
/// on. Each holds the memory of a booted guest, and anybody may ask for any shape.
const KEPT_SHAPES: usize = 12;
/// Shapes that wait to be made at one time; each is a boot of some seconds.
const WAITING_BUILDS: usize = 8;

/// Disks above each other, at the very most.
const LONGEST_CHAIN: usize = 64;

/// The user of processes and files when a request names none, in the `minimal` template.
const DEFAULT_USER: &str = "root";

/// What can restore an image, and what it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Manifest {
    pub(crate) platform: Platform,
    pub(crate) shape: Shape,
    pub(crate) disk_mb: u32,
    /// Of the device state; the memory is checked by its size alone, for its bytes are too many to read at each start.
    pub(crate) state_sha256: String,
    /// Access token that the frozen guest agent believes in; empty for none.
    pub(crate) token: String,
    pub(crate) default_user: String,
    pub(crate) kernel: String,
    /// Image whose disk is below this one's, relative to the images folder.
    pub(crate) parent: Option<PathBuf>,
}

/// A complete image.
#[derive(Debug, Clone)]
pub(crate) struct Image {
    pub(crate) dir: ImageDir,
    pub(crate) manifest: Manifest,
    memory: PathBuf,
}

impl Image {
    pub(crate) fn memory_path(&self) -> &Path {
        &self.memory
    }

    /// Reads an image and checks that this host can restore it.
    fn open(path: &Path, qemu: &Qemu) -> Result<Self> {
        let image = Self::read(path)?;
        image.check(qemu)?;
        Ok(image)
    }

    fn read(path: &Path) -> Result<Self> {
        let dir = ImageDir::new(path.to_path_buf());
        let manifest = dir.manifest();
        let bytes = std::fs::read(&manifest).at("read", &manifest)?;
        let manifest = serde_json::from_slice(&bytes)
            .map_err(|error| HostError::TemplateNotReady(format!("its manifest is damaged: {error}")))?;
        Ok(Self {
            memory: dir.memory(),
            dir,
            manifest,
        })
    }

    fn check(&self, qemu: &Qemu) -> Result<()> {
        let here = qemu.platform();
        let made = &self.manifest.platform;
        let fits = made.vmm == here.vmm
            && made.machine == here.machine
            && made.accelerator == here.accelerator
            && made.cpu == here.cpu;
        if !fits {
            return Err(HostError::TemplateNotReady(format!(
                "it was made with {} {} on {} ({}), which this host does not have",
                made.vmm,
                made.version,
                made.accelerator.as_str(),
                made.cpu
            )));
        }
        let memory = self.dir.memory();
        let length = std::fs::metadata(&memory).at("look at", &memory)?.len();
        if length != u64::from(self.manifest.shape.memory_mb) << 20 {
            return Err(HostError::TemplateNotReady(
                "its memory file has the wrong size".to_owned(),
            ));
        }
        let state = self.dir.state();
        let bytes = std::fs::read(&state).at("read", &state)?;
        if hex::encode(sha2::Sha256::digest(&bytes)) != self.manifest.state_sha256 {
            return Err(HostError::TemplateNotReady(
                "its device state is damaged".to_owned(),
            ));
        }
        Ok(())
    }

    /// Completes an image whose files are in place: writes the manifest, and lets `group` alone read what VM processes
    /// need.
    pub(crate) fn seal(
        dir: &ImageDir,
        qemu: &Qemu,
        group: Option<u32>,
        mut manifest: Manifest,
    ) -> Result<()> {
        use std::os::unix::fs::PermissionsExt as _;
        let state = dir.state();
        let bytes = std::fs::read(&state).at("read", &state)?;
        manifest.state_sha256 = hex::encode(sha2::Sha256::digest(&bytes));
        let text = serde_json::to_vec_pretty(&manifest)
            .map_err(|error| HostError::Vmm(format!("cannot write a manifest: {error}")))?;
        let target = dir.manifest();
        std::fs::write(&target, text).at("write", &target)?;
        // VM processes read memory and disk through their group. Older QEMU insists on opening a private mapping's
        // file for writing, though it never writes to it.
        let memory_mode = if qemu.maps_read_only() { 0o440 } else { 0o660 };
        for (path, mode) in [
            (dir.memory(), memory_mode),
            (dir.disk(), 0o440),
            (state, 0o400),
            (target, 0o400),
            (dir.path().into(), 0o750),
        ] {
            if let Some(group) = group {
                std::os::unix::fs::chown(&path, Some(0), Some(group)).at("protect", &path)?;
            }
            let mode = if group.is_none() && path != dir.path() && mode == 0o440 {
                0o400
            } else {
                mode
            };
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).at("protect", &path)?;
        }
        Ok(())
    }

    pub(crate) fn size_bytes(&self) -> u64 {
        crate::disk::allocated_bytes(&self.dir.memory()) + crate::disk::allocated_bytes(&self.dir.disk())
    }
}

/// All templates of this host.
pub(crate) struct TemplateStore {
    layout: Layout,
    qemu: Arc<Qemu>,
    recipe: Recipe,
    /// Where packages come from, other than the machine's own settings say.
    mirror: Option<DebianMirror>,
    /// Part of the name of the built-in template's images: what they depend on. Made once, for the agent in it is large.
    minimal_key: String,
    slots: Arc<Slots>,
    /// State of the built-in template's usual shape, shown to operators.
    pub(crate) minimal: Progress,
    /// One build at a time: those who come later wait, and may find what they wait for made by then.
    building: Arc<tokio::sync::Mutex<()>>,
    /// Builds under way; they end with the agent.
    builds: TaskTracker,
    stop: CancellationToken,
    /// Places to wait in.
    waiting: Arc<tokio::sync::Semaphore>,
    /// When images of the built-in template were last started from, as far as this run of the agent knows.
    used: Mutex<HashMap<PathBuf, SystemTime>>,
    /// Held while images are taken in or out of use, so that one is not removed while it is found good.
    marks: Mutex<()>,
    /// Groups that may read one template each; none where VM processes are the agent's own user's.
    groups: Option<Groups>,
}

impl TemplateStore {
    pub(crate) fn new(
        layout: Layout,
        qemu: Arc<Qemu>,
        slots: Arc<Slots>,
        ca_bundle: Option<PathBuf>,
        mirror: Option<DebianMirror>,
    ) -> Result<Self> {
        let recipe = Recipe::minimal(ca_bundle)?;
        let platform = qemu.platform();
        let minimal_key = fingerprint(&[
            &serde_json::to_vec(&platform).unwrap_or_default(),
            qemu.cpu_model().as_bytes(),
            kernel_settings(platform.accelerator).as_bytes(),
            ENVD,
            DEFAULT_USER.as_bytes(),
            recipe.key.as_bytes(),
        ]);
        let groups = qemu.vm_ids.map(|ids| Groups::assign(&layout, ids));
        Ok(Self {
            layout,
            qemu,
            recipe,
            mirror,
            minimal_key,
            slots,
            minimal: Progress::new(),
            building: Arc::default(),
            builds: TaskTracker::new(),
            stop: CancellationToken::new(),
            waiting: Arc::new(tokio::sync::Semaphore::new(WAITING_BUILDS)),
            used: Mutex::default(),
            marks: Mutex::default(),
            groups,
        })
    }

    /// The group of the next template: that of no other.
    pub(crate) fn take_group(&self) -> Result<Option<u32>> {
        self.groups
            .as_ref()
            .map(|groups| groups.take(&self.layout))
            .transpose()
    }

    /// The groups that a process needs beside that of all VMs to read an image and the disks below its own.
    pub(crate) fn groups(&self, image: &Image) -> Result<Vec<u32>> {
        let Some(groups) = &self.groups else {
            return Ok(Vec::new());
        };
        let mut needed = Vec::from_iter(groups.of(image.dir.path())?);
        if let Some(parent) = &image.manifest.parent {
            for below in self.chain(parent)? {
                needed.extend(groups.of(&self.layout.images().join(below))?);
            }
        }
        Ok(needed)
    }

    /// The shape in which the built-in template is kept ready.
    pub(crate) const USUAL_SHAPE: Shape = Shape {
        vcpus: 1,
        memory_mb: 512,
    };

    /// Makes the built-in template's usual image if it is missing, showing its progress.
    ///
    /// # Errors
    /// Why it could not be made; shown as its state too.
    pub(crate) async fn prepare_minimal(self: &Arc<Self>) -> Result<()> {
        self.minimal_image(Self::USUAL_SHAPE).await?;
        self.retire_outdated();
        Ok(())
    }

    /// Takes images of the built-in template out of use that an earlier version or setting made. They go when their
    /// last sandbox does.
    fn retire_outdated(&self) {
        let _marks = lock(&self.marks);
        for path in children(&self.minimal_dir()) {
            if shape_of(&path, &self.minimal_key).is_none() {
                take_out_of_use(&path);
            }
        }
    }

    fn minimal_dir(&self) -> PathBuf {
        self.layout.template(TeamId::PLATFORM, TemplateId::MINIMAL)
    }

    /// The image from which a sandbox of `shape` starts. For the built-in template it is made when missing.
    pub(crate) async fn image(
        self: &Arc<Self>,
        team: TeamId,
        template: TemplateId,
        shape: Shape,
    ) -> Result<Image> {
        if template == TemplateId::MINIMAL && team == TeamId::PLATFORM {
            return self.minimal_image(shape).await;
        }
        let path = self.snapshot_path(team, template);
        if !path.is_dir() || ImageDir::new(path.clone()).deleted_marker().exists() {
            return Err(HostError::NotFound {
                what: "template",
                id: template.to_string(),
            });
        }
        let image = Image::open(&path, &self.qemu)?;
        if image.manifest.shape != shape {
            let Shape { vcpus, memory_mb } = image.manifest.shape;
            return Err(HostError::InvalidArgument {
                field: "template",
                message: format!(
                    "it holds a running memory of {vcpus} vCPU and {memory_mb} MiB; leave the size out"
                ),
            });
        }
        Ok(image)
    }

    /// The image at a path kept in a journal or manifest, whether or not it is still offered to new sandboxes.
    pub(crate) fn image_at(&self, relative: &Path) -> Result<Image> {
        let safe = relative
            .components()
            .all(|part| matches!(part, std::path::Component::Normal(_)));
        if !safe {
            return Err(HostError::TemplateNotReady("its path is damaged".to_owned()));
        }
        Image::open(&self.layout.images().join(relative), &self.qemu)
    }

    /// The images whose disks lie above each other, from this one down to the one that stands on none.
    pub(crate) fn chain(&self, relative: &Path) -> Result<Vec<PathBuf>> {
        let mut chain = vec![relative.to_path_buf()];
        while let Some(last) = chain.last()
            && chain.len() < LONGEST_CHAIN
        {
            match Image::read(&self.layout.images().join(last))?.manifest.parent {
                Some(parent) => chain.push(parent),
                None => return Ok(chain),
            }
        }
        Err(HostError::TemplateNotReady(format!(
            "it stands on more than {LONGEST_CHAIN} others"
        )))
    }

    pub(crate) fn relative(&self, image: &Image) -> PathBuf {
        image
            .dir
            .path()
            .strip_prefix(self.layout.images())
            .unwrap_or(image.dir.path())
            .to_path_buf()
    }

    pub(crate) fn snapshot_path(&self, team: TeamId, template: TemplateId) -> PathBuf {
        self.layout.template(team, template).join("image")
    }

    /// The built-in template in a shape, made when there is none.
    async fn minimal_image(self: &Arc<Self>, shape: Shape) -> Result<Image> {
        if let Some(image) = self.find_minimal(shape) {
            return Ok(image);
        }
        let Ok(place) = Arc::clone(&self.waiting).try_acquire_owned() else {
            return Err(HostError::NoCapacity(format!(
                "the template 'minimal' is being prepared in {WAITING_BUILDS} other sizes; try again in a minute, or \
                 leave vcpus and memory_mb out"
            )));
        };
        let store = Arc::clone(self);
        // A task of its own: it goes on when the caller hangs up, for the next one.
        let work = async move {
            let _place = place;
            let _one_at_a_time = Arc::clone(&store.building).lock_owned().await;
            if let Some(image) = store.find_minimal(shape) {
                return Ok(image);
            }
            let usual = shape == Self::USUAL_SHAPE;
            let progress = if usual {
                store.minimal.clone()
            } else {
                Progress::new()
            };
            let made = store.make_minimal(shape, &progress).await;
            match &made {
                Ok(image) => progress.set(BuildState::Ready {
                    size_bytes: image.size_bytes(),
                }),
                Err(error) => {
                    tracing::error!(
                        error = error as &dyn std::error::Error,
                        vcpus = shape.vcpus,
                        memory_mb = shape.memory_mb,
                        "cannot make the template 'minimal'"
                    );
                    progress.set(BuildState::Failed(error.to_string()));
                }
            }
            made
        };
        let stop = self.stop.clone();
        let build = self.builds.spawn(async move {
            tokio::select! {
                made = work => made,
                // What it has made so far ends with the work that is dropped.
                () = stop.cancelled() => Err(HostError::ShuttingDown),
            }
        });
        build
            .await
            .map_err(|error| HostError::Vmm(format!("making the template failed: {error}")))?
    }

    /// An image of the built-in template in a shape that this host can restore. Others of that shape, which it
    /// cannot, are taken out of use: sandboxes may stand on them, and perhaps another version can read them.
    fn find_minimal(&self, shape: Shape) -> Option<Image> {
        let _marks = lock(&self.marks);
        for path in children(&self.minimal_dir()) {
            if shape_of(&path, &self.minimal_key) != Some(shape) {
                continue;
            }
            match Image::open(&path, &self.qemu) {
                Ok(image) => {
                    // It may have been outdated in the eyes of another version.
                    match std::fs::remove_file(image.dir.deleted_marker()) {
                        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                            tracing::warn!(image = %path.display(), %error, "cannot take an image into use again");
                            continue;
                        }
                        _ => {}
                    }
                    if shape == Self::USUAL_SHAPE
                        && !matches!(*self.minimal.subscribe().borrow(), BuildState::Ready { .. })
                    {
                        self.minimal.set(BuildState::Ready {
                            size_bytes: image.size_bytes(),
                        });
                    }
                    lock(&self.used).insert(path, SystemTime::now());
                    return Some(image);
                }
                Err(error) => {
                    if !ImageDir::new(path.clone()).deleted_marker().exists() {
                        tracing::warn!(%error, image = %path.display(), "an image is not usable; another is made");
                        take_out_of_use(&path);
                    }
                }
            }
        }
        None
    }

    async fn make_minimal(&self, shape: Shape, progress: &Progress) -> Result<Image> {
        let started = std::time::Instant::now();
        let mirror = self.mirror.as_ref();
        let kernel = Kernel::ensure(&self.layout, mirror, self.recipe.suite, progress).await?;
        let rootfs = rootfs::ensure(&self.layout, &self.recipe, mirror, progress).await?;
        let slot = self.slots.take()?;
        let name = uuid::Uuid::new_v4().simple().to_string();
        let work = WorkDir::create(self.layout.tmp().join(format!("build-{name}")))?;
        let plan = BootPlan {
            kernel: &kernel,
            rootfs: &rootfs,
            shape,
            disk_mb: self.recipe.disk_mb,
            slot: slot.number(),
            work: work.path(),
            default_user: DEFAULT_USER,
        };
        freeze(&self.qemu, &plan, progress).await?;
        let dir = self.minimal_dir();
        std::fs::create_dir_all(&dir).at("create", &dir)?;
        let Shape { vcpus, memory_mb } = shape;
        let key = &self.minimal_key;
        let mut path = dir.join(format!("{vcpus}x{memory_mb}-{key}"));
        if path.exists() {
            // One that is out of use has the plain name.
            path = dir.join(format!("{vcpus}x{memory_mb}-{key}.{}", &name[..8]));
        }
        work.persist(&path)?;
        tracing::info!(
            template = "minimal",
            vcpus,
            memory_mb,
            seconds = started.elapsed().as_secs_f32(),
            "template image made"
        );
        lock(&self.used).insert(path.clone(), SystemTime::now());
        Image::open(&path, &self.qemu)
    }

    /// Ends the builds under way, with all that they have made so far; no other begins.
    pub(crate) async fn close(&self) {
        self.stop.cancel();
        self.builds.close();
        self.builds.wait().await;
    }

    /// Takes a template out of use. Its files go when nothing depends on them any more: see [`Self::collect`].
    pub(crate) fn delete(&self, team: TeamId, template: TemplateId) -> Result<()> {
        let dir = ImageDir::new(self.snapshot_path(team, template));
        if dir.path().is_dir() {
            let marker = dir.deleted_marker();
            std::fs::write(&marker, b"").at("mark as deleted", &marker)?;
        }
        Ok(())
    }

    /// Removes images that are out of use and that neither `in_use` nor another image's disk depends on.
    pub(crate) fn collect(&self, in_use: &[PathBuf]) {
        let _marks = lock(&self.marks);
        self.bound_shapes(in_use);
        loop {
            let images = self.all_images();
            let parents: Vec<&PathBuf> = images
                .iter()
                .filter_map(|image| image.manifest.parent.as_ref())
                .collect();
            let mut removed = false;
            for image in &images {
                let relative = self.relative(image);
                if image.dir.deleted_marker().exists()
                    && !in_use.contains(&relative)
                    && !parents.contains(&&relative)
                {
                    match std::fs::remove_dir_all(image.dir.path()) {
                        Ok(()) => {
                            removed = true;
                            if let Some(template) = image.dir.path().parent() {
                                // Only when empty: other images of it may be in use.
                                let _ = std::fs::remove_dir(template);
                            }
                        }
                        Err(error) => {
                            tracing::warn!(image = %image.dir.path().display(), %error, "cannot remove an image");
                        }
                    }
                }
            }
            // A removed image may have been the last to need its parent.
            if !removed {
                return;
            }
        }
    }

    /// Takes the longest unused shapes of the built-in template out of use when there are too many.
    fn bound_shapes(&self, in_use: &[PathBuf]) {
        let used = lock(&self.used);
        let mut spare: Vec<(SystemTime, PathBuf)> = children(&self.minimal_dir())
            .into_iter()
            .filter(|path| {
                let relative = path.strip_prefix(self.layout.images()).unwrap_or(path);
                shape_of(path, &self.minimal_key).is_some_and(|shape| shape != Self::USUAL_SHAPE)
                    && !in_use.iter().any(|image| image == relative)
                    && !ImageDir::new(path.clone()).deleted_marker().exists()
            })
            .map(|path| {
                let made = || std::fs::metadata(&path).and_then(|meta| meta.modified());
                let last = used.get(&path).copied().or_else(|| made().ok());
                (last.unwrap_or(SystemTime::UNIX_EPOCH), path)
            })
            .collect();
        spare.sort();
        for (_, path) in spare.iter().take(spare.len().saturating_sub(KEPT_SHAPES)) {
            take_out_of_use(path);
        }
    }

    fn all_images(&self) -> Vec<Image> {
        children(&self.layout.team_images())
            .iter()
            .flat_map(|team| children(team))
            .flat_map(|template| children(&template))
            .filter_map(|image| Image::read(&image).ok())
            .collect()
    }
}

/// The shape in the name of an image of the built-in template (`{vcpus}x{memory_mb}-{key}`, with `.` and a number of its
/// own when there was one before); `None` for one of another key.
fn shape_of(path: &Path, key: &str) -> Option<Shape> {
    let (shape, of) = path.file_name()?.to_str()?.split_once('-')?;
    if of.split_once('.').map_or(of, |(of, _)| of) != key {
        return None;
    }
    let (vcpus, memory_mb) = shape.split_once('x')?;
    Some(Shape {
        vcpus: vcpus.parse().ok()?,
        memory_mb: memory_mb.parse().ok()?,
    })
}

/// Lets an image go when nothing stands on it any more.
fn take_out_of_use(path: &Path) {
    let marker = ImageDir::new(path.to_path_buf()).deleted_marker();
    if let Err(error) = std::fs::write(&marker, b"") {
        tracing::warn!(path = %marker.display(), %error, "cannot take an image out of use");
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// What is in a folder; nothing when it is not there.
pub(super) fn children(dir: &Path) -> Vec<PathBuf> {
    std::fs::read_dir(dir)
        .map(|entries| entries.filter_map(|entry| Some(entry.ok()?.path())).collect())
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vmm::{Accelerator, MemoryCgroup};

    fn store(root: &Path) -> Arc<TemplateStore> {
        let qemu = Qemu {
            binary: "qemu-system-x86_64".into(),
            version: (10, 0, 2),
            accelerator: Accelerator::Tcg,
            host_cpu: "a processor".to_owned(),
            cgroup: MemoryCgroup::Unavailable,
            vm_ids: None,
        };
        let layout = Layout::create(&root.join("data"), &root.join("cache")).unwrap();
        Arc::new(TemplateStore::new(layout, Arc::new(qemu), Slots::new(1), None, None).unwrap())
    }

    fn image(store: &TemplateStore, key: &str, parent: Option<PathBuf>) -> PathBuf {
        let dir = store
            .layout
            .template(TeamId::PLATFORM, TemplateId::MINIMAL)
            .join(format!("1x512-{key}"));
        std::fs::create_dir_all(&dir).unwrap();
        let manifest = Manifest {
            platform: store.qemu.platform(),
            shape: TemplateStore::USUAL_SHAPE,
            disk_mb: 1,
            state_sha256: String::new(),
            token: String::new(),
            default_user: "root".to_owned(),
            kernel: "6.1".to_owned(),
            parent,
        };
        std::fs::write(dir.join("manifest.json"), serde_json::to_vec(&manifest).unwrap()).unwrap();
        dir
    }

    #[test]
    fn outdated_images_go_with_their_last_user() {
        let root = tempfile::tempdir().unwrap();
        let store = store(root.path());
        let current = image(&store, &store.minimal_key.clone(), None);
        let used = image(&store, "0123456789abcdef", None);
        let unused = image(&store, "fedcba9876543210", None);
        let relative = used.strip_prefix(store.layout.images()).unwrap().to_path_buf();
        store.retire_outdated();
        store.collect(std::slice::from_ref(&relative));
        assert!(current.exists() && used.exists() && !unused.exists());

        // A template that stands on it keeps it as well.
        let above = image(&store, &format!("above-{}", store.minimal_key), Some(relative));
        store.collect(&[]);
        assert!(used.exists());
        std::fs::remove_dir_all(above).unwrap();
        store.collect(&[]);
        assert!(current.exists() && !used.exists());
    }

    #[test]
    fn shapes_that_nobody_asks_for_any_more_are_let_go() {
        let root = tempfile::tempdir().unwrap();
        let store = store(root.path());
        let dir = store.minimal_dir();
        let made: Vec<PathBuf> = (0..KEPT_SHAPES + 3)
            .map(|number| {
                let path = image(&store, &store.minimal_key.clone(), None);
                let shaped = dir.join(format!("2x{}-{}", 256 + number, store.minimal_key));
                std::fs::rename(&path, &shaped).unwrap();
                let when = SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(number as u64);
                store.used.lock().unwrap().insert(shaped.clone(), when);
                shaped
            })
            .collect();
        let usual = image(&store, &store.minimal_key.clone(), None);
        let oldest = made[0].strip_prefix(store.layout.images()).unwrap().to_path_buf();
        store.collect(&[oldest]);
        let there: Vec<bool> = made.iter().map(|path| path.exists()).collect();
        // The oldest has a sandbox; the next two are over the bound.
        assert_eq!(there[..4], [true, false, false, true]);
        assert!(there[3..].iter().all(|there| *there) && usual.exists());
    }

    #[test]
    fn an_unusable_image_stays_for_those_who_stand_on_it() {
        let root = tempfile::tempdir().unwrap();
        let store = store(root.path());
        // It has no memory, so it cannot be opened.
        let damaged = image(&store, &store.minimal_key.clone(), None);
        let relative = damaged.strip_prefix(store.layout.images()).unwrap().to_path_buf();
        assert!(store.find_minimal(TemplateStore::USUAL_SHAPE).is_none());
        store.collect(std::slice::from_ref(&relative));
        assert!(damaged.exists());
        store.collect(&[]);
        assert!(!damaged.exists());
    }

    #[test]
    fn names_of_images_are_read() {
        let shape = |name: &str| shape_of(Path::new(name), "k").map(|shape| (shape.vcpus, shape.memory_mb));
        assert_eq!(shape("/a/2x256-k"), Some((2, 256)));
        assert_eq!(shape("2x256-k.0badc0de"), Some((2, 256)));
        for other in ["2x256-l", "2x256", "2-k", "x-k", "2x256-kk", ""] {
            assert_eq!(shape(other), None, "{other}");
        }
    }

    #[test]
    fn another_bundle_of_certificates_makes_another_template() {
        let root = tempfile::tempdir().unwrap();
        let bundle = root.path().join("bundle.pem");
        let key = || Recipe::minimal(Some(bundle.clone())).unwrap().key;
        std::fs::write(&bundle, "one").unwrap();
        let before = key();
        std::fs::write(&bundle, "two").unwrap();
        assert_ne!(before, key());
        assert_ne!(before, Recipe::minimal(None).unwrap().key);
    }
}

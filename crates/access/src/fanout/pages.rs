//! Pages of audiences' mailboxes, shared by the devices that catch up at the same time: each is read once.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use barid_core::{AudienceKey, Seq};
use barid_mailbox::Page;
use parking_lot::Mutex;
use tokio::sync::OnceCell;
use tokio::time::Instant;

/// Entries of a page, which begins behind a multiple of this, so that devices at different positions share it.
pub(super) const PAGE_ENTRIES: u32 = 64;
/// Bytes of a page; one entry alone may be larger.
pub(super) const PAGE_BYTES: u32 = 64 << 10;
/// Pages that are kept. Beyond it, devices read pages of their own.
const PAGES_MAX: usize = 256;
/// How long a whole page is kept: its entries change only by recall, collapse and eviction.
const WHOLE: Duration = Duration::from_secs(5);
/// How long a page at the mailbox's end is kept: the next message makes it out of date.
const LAST: Duration = Duration::from_millis(200);

type Cell = Arc<OnceCell<Arc<Page>>>;

/// A page that is being read, or was read.
#[derive(Debug)]
struct Kept {
    cell: Cell,
    /// When its reading began.
    since: Instant,
    /// `None` while it is being read.
    until: Option<Instant>,
}

/// The pages of all audiences of a node.
#[derive(Debug, Default)]
pub(super) struct Pages(Mutex<HashMap<(AudienceKey, Seq), Kept>>);

impl Pages {
    /// Where the page begins that has the entry after `after`.
    pub fn begin(after: Seq) -> Seq {
        Seq(after.0 - after.0 % u64::from(PAGE_ENTRIES))
    }

    /// The page behind a seq, whose reading did not begin before `not_before`. `read` is called if nobody has read it, and
    /// nobody is reading it. Cancel-safe: if the caller that reads is cancelled, another one that waits reads. Also returns
    /// whether this caller has read it.
    pub async fn get(
        &self,
        audience: &AudienceKey,
        after: Seq,
        not_before: Option<Instant>,
        read: impl AsyncFnOnce() -> Page,
    ) -> (Arc<Page>, bool) {
        let key = (audience.clone(), after);
        let Some(cell) = self.cell(&key, not_before) else { return (Arc::new(read().await), true) };
        let mut is_reader = false;
        let page = cell.get_or_init(async || {
            is_reader = true;
            Arc::new(read().await)
        });
        let page = Arc::clone(page.await);
        if is_reader {
            self.keep(&key, &cell, &page);
        }
        (page, is_reader)
    }

    /// The page's cell; `None`: there is no room for another.
    fn cell(&self, key: &(AudienceKey, Seq), not_before: Option<Instant>) -> Option<Cell> {
        let (mut pages, now) = (self.0.lock(), Instant::now());
        let is_current = |kept: &Kept| kept.until.is_none_or(|until| until > now);
        let serves = |kept: &&Kept| {
            is_current(kept) && not_before.is_none_or(|earliest| kept.since >= earliest)
        };
        if let Some(kept) = pages.get(key).filter(serves) {
            return Some(Arc::clone(&kept.cell));
        }
        if pages.len() >= PAGES_MAX {
            // Readings that were given up have no reader.
            pages.retain(|_, kept| is_current(kept) && !is_abandoned(kept));
        }
        if pages.len() >= PAGES_MAX {
            return None;
        }
        let cell = Cell::default();
        pages.insert(key.clone(), Kept { cell: Arc::clone(&cell), since: now, until: None });
        Some(cell)
    }

    fn keep(&self, key: &(AudienceKey, Seq), cell: &Cell, page: &Page) {
        let is_last = page.entries.is_empty() || page.newest.0 < key.1.0 + u64::from(PAGE_ENTRIES);
        let until = Instant::now() + if is_last { LAST } else { WHOLE };
        if let Some(kept) = self.0.lock().get_mut(key).filter(|kept| Arc::ptr_eq(&kept.cell, cell))
        {
            kept.until = Some(until);
        }
    }

    /// Forgets pages that are out of date. Call it every second.
    pub fn sweep(&self) {
        let now = Instant::now();
        self.0
            .lock()
            .retain(|_, kept| !is_abandoned(kept) && kept.until.is_none_or(|until| until > now));
    }
}

/// Whether a page was not read, and nobody reads it.
fn is_abandoned(kept: &Kept) -> bool {
    kept.until.is_none() && Arc::strong_count(&kept.cell) == 1
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use barid_core::{AppId, Audience, Chain, Epoch};
    use tokio::time::sleep;

    use super::*;

    fn page(newest: u64) -> Page {
        Page {
            epoch: Epoch(1),
            oldest: Seq(1),
            chain_before_oldest: Chain::START,
            newest: Seq(newest),
            entries: vec![bytes::Bytes::from_static(b"x")],
            cursor: None,
        }
    }

    fn key() -> AudienceKey {
        AudienceKey { app: AppId::new("demo").unwrap(), audience: Audience::Everyone }
    }

    #[tokio::test(start_paused = true)]
    async fn devices_that_catch_up_together_read_a_page_once() {
        let (pages, reads) = (Pages::default(), AtomicU32::new(0));
        let read = |newest| {
            let (pages, reads) = (&pages, &reads);
            async move {
                let read = async || {
                    sleep(Duration::from_millis(50)).await;
                    reads.fetch_add(1, Ordering::Relaxed);
                    page(newest)
                };
                pages.get(&key(), Seq(0), None, read).await.0.newest.0
            }
        };
        let many = futures::future::join_all((0..100).map(|_| read(100))).await;
        assert_eq!((many, reads.load(Ordering::Relaxed)), (vec![100; 100], 1));
        sleep(Duration::from_secs(4)).await;
        assert_eq!((read(101).await, reads.load(Ordering::Relaxed)), (100, 1), "it is whole");
        sleep(Duration::from_secs(2)).await;
        assert_eq!((read(10).await, reads.load(Ordering::Relaxed)), (10, 2));
        sleep(LAST).await;
        assert_eq!((read(11).await, reads.load(Ordering::Relaxed)), (11, 3), "there may be more");
        // A page that was read before is of no use to who doubts it.
        let doubting = pages.get(&key(), Seq(0), Some(Instant::now()), async || page(12)).await;
        assert_eq!((doubting.0.newest, doubting.1), (Seq(12), true));
        pages.sweep();
        sleep(WHOLE).await;
        pages.sweep();
        assert!(pages.0.lock().is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn a_reader_that_is_cancelled_leaves_nobody_waiting() {
        let (pages, key) = (Pages::default(), key());
        let never = pages.get(&key, Seq(0), None, async || std::future::pending().await);
        let cancelled = tokio::time::timeout(Duration::from_millis(10), never);
        let other = async {
            sleep(Duration::from_millis(5)).await;
            pages.get(&key, Seq(0), None, async || page(7)).await.0.newest
        };
        let (cancelled, other) = tokio::join!(cancelled, other);
        assert!(cancelled.is_err());
        assert_eq!(other, Seq(7));
        let given_up = pages.get(&key, Seq(64), None, async || std::future::pending().await);
        let _ = tokio::time::timeout(Duration::from_millis(10), given_up).await;
        pages.sweep();
        assert_eq!(pages.0.lock().len(), 1);
    }
}

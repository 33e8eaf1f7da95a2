//! The audiences for which this node is, or should be, listed in Redis. Dispatchers send a message only to nodes that
//! were listed when it was accepted. Pure: no Redis, and time is an argument.

use std::collections::{HashMap, VecDeque};

use barid_core::AudienceKey;
use barid_session::Seconds;

/// How long a node stays listed after its last member has left, seconds: members come and go.
const LINGER_SECONDS: Seconds = 60;
/// Pause before a failed request is repeated, seconds.
const RETRY_SECONDS: Seconds = 1;

/// One audience.
#[derive(Debug, Default)]
struct Listing {
    /// The audience has members here, or had within the linger.
    wanted: bool,
    /// Redis has listed the node, as far as is known.
    listed: bool,
    /// A request is under way, or waits in a queue.
    asking: bool,
    /// The request under way may be out of date: repeat it.
    again: bool,
    /// When the last member left.
    left: Option<Seconds>,
    /// When to confirm the listing; entries of the queue with another time are out of date.
    confirm_at: Seconds,
}

/// All of them. At most one request an audience is under way.
#[derive(Debug)]
pub(super) struct Listings {
    audiences: HashMap<AudienceKey, Listing>,
    /// Requests to send now.
    due: VecDeque<AudienceKey>,
    /// Audiences whose last member has left, and failed requests, by when to look at them. Of each kind all wait equally
    /// long, so each queue is in order.
    leaving: VecDeque<(Seconds, AudienceKey)>,
    failed: VecDeque<(Seconds, AudienceKey)>,
    /// Listed audiences, by when to confirm them.
    confirming: VecDeque<(Seconds, AudienceKey)>,
    confirm_every: Seconds,
    /// How many are listed.
    listed: usize,
    now: Seconds,
}

/// A request to Redis.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Due {
    pub audience: AudienceKey,
    /// Whether the node is to be listed; else it is to be removed.
    pub has_members: bool,
}

impl Listings {
    /// Listed audiences are confirmed every `confirm_every` seconds.
    pub fn new(confirm_every: Seconds) -> Self {
        Self {
            audiences: HashMap::new(),
            due: VecDeque::new(),
            leaving: VecDeque::new(),
            failed: VecDeque::new(),
            confirming: VecDeque::new(),
            confirm_every,
            listed: 0,
            now: 0,
        }
    }

    /// The audience has its first member here. Also a node that is listed still asks, to learn where the mailbox stands.
    pub fn enter(&mut self, audience: &AudienceKey) {
        let listing = self.audiences.entry(audience.clone()).or_default();
        (listing.wanted, listing.left) = (true, None);
        self.ask(audience);
    }

    /// The audience's last member here has left.
    pub fn leave(&mut self, audience: &AudienceKey) {
        if let Some(listing) = self.audiences.get_mut(audience) {
            listing.left = Some(self.now);
            self.leaving.push_back((self.now + LINGER_SECONDS, audience.clone()));
        }
    }

    /// Makes due what time has made due.
    pub fn tick(&mut self, now: Seconds) {
        self.now = now;
        for (_, audience) in ripe(&mut self.failed, now) {
            self.due.push_back(audience);
        }
        for (_, audience) in ripe(&mut self.leaving, now) {
            let Some(listing) = self.audiences.get_mut(&audience) else { continue };
            // It may have had members since.
            if listing.left.is_some_and(|left| left + LINGER_SECONDS <= now) {
                (listing.wanted, listing.left) = (false, None);
                self.ask(&audience);
            }
        }
        for (at, audience) in ripe(&mut self.confirming, now) {
            let listing = self.audiences.get(&audience);
            if listing.is_some_and(|listing| listing.listed && listing.confirm_at == at) {
                self.ask(&audience);
            }
        }
    }

    /// Asks where the mailboxes of these audiences stand.
    pub fn ask_again(&mut self, audiences: impl IntoIterator<Item = AudienceKey>) {
        audiences.into_iter().for_each(|audience| self.ask(&audience));
    }

    /// The audiences that are listed, or are to be.
    pub fn audiences(&self) -> impl Iterator<Item = &AudienceKey> {
        self.audiences.keys()
    }

    /// Redis may have forgotten the listings of these audiences.
    pub fn forgotten(&mut self, of: impl Fn(&AudienceKey) -> bool) {
        let audiences: Vec<AudienceKey> =
            self.audiences.keys().filter(|audience| of(audience)).cloned().collect();
        self.ask_again(audiences);
    }

    fn ask(&mut self, audience: &AudienceKey) {
        let Some(listing) = self.audiences.get_mut(audience) else { return };
        if listing.asking {
            listing.again = true;
        } else {
            listing.asking = true;
            self.due.push_back(audience.clone());
        }
    }

    /// The next request to send.
    pub fn next(&mut self) -> Option<Due> {
        while let Some(audience) = self.due.pop_front() {
            let Some(listing) = self.audiences.get_mut(&audience) else { continue };
            listing.again = false;
            return Some(Due { has_members: listing.wanted, audience });
        }
        None
    }

    /// Redis has executed a request.
    pub fn done(&mut self, due: &Due) {
        let Some(listing) = self.audiences.get_mut(&due.audience) else { return };
        listing.asking = false;
        self.listed -= usize::from(std::mem::replace(&mut listing.listed, due.has_members));
        self.listed += usize::from(due.has_members);
        if listing.again || listing.wanted != due.has_members {
            self.ask(&due.audience);
        } else if !due.has_members {
            self.audiences.remove(&due.audience);
        } else {
            listing.confirm_at = self.now + self.confirm_every;
            self.confirming.push_back((listing.confirm_at, due.audience.clone()));
        }
    }

    /// Redis has not answered a request, or refused it as out of date: repeats it after a pause.
    pub fn failed(&mut self, due: Due) {
        self.failed.push_back((self.now + RETRY_SECONDS, due.audience));
    }

    /// Number of audiences for which Redis lists the node.
    pub fn listed(&self) -> usize {
        self.listed
    }
}

/// Removes what is ripe from the front of a queue.
fn ripe(queue: &mut VecDeque<(Seconds, AudienceKey)>, now: Seconds) -> Vec<(Seconds, AudienceKey)> {
    let count = queue.iter().take_while(|(at, _)| *at <= now).count();
    queue.drain(..count).collect()
}

#[cfg(test)]
mod tests {
    use barid_core::{AppId, Audience};

    use super::*;

    fn key(name: &str) -> AudienceKey {
        AudienceKey { app: AppId::new("demo").unwrap(), audience: Audience::new(name).unwrap() }
    }

    fn due(name: &str, has_members: bool) -> Option<Due> {
        Some(Due { audience: key(name), has_members })
    }

    /// Takes the next request, which must be this one, and answers it.
    fn answer(listings: &mut Listings, name: &str, has_members: bool) {
        let next = listings.next();
        assert_eq!(next, due(name, has_members));
        listings.done(&next.unwrap());
    }

    #[test]
    fn a_node_is_listed_from_the_first_member_until_a_while_after_the_last() {
        let mut listings = Listings::new(600);
        listings.enter(&key("eng"));
        answer(&mut listings, "eng", true);
        listings.leave(&key("eng"));
        listings.tick(59);
        listings.enter(&key("eng"));
        answer(&mut listings, "eng", true);
        listings.tick(61);
        assert_eq!(listings.next(), None, "it has members again");
        listings.leave(&key("eng"));
        listings.tick(121);
        answer(&mut listings, "eng", false);
        assert_eq!((listings.next(), listings.listed()), (None, 0));
    }

    #[test]
    fn a_member_that_comes_while_the_node_is_being_removed_has_it_listed_again() {
        let mut listings = Listings::new(600);
        listings.enter(&key("eng"));
        answer(&mut listings, "eng", true);
        listings.leave(&key("eng"));
        listings.tick(60);
        let removing = listings.next().unwrap();
        assert!(!removing.has_members);
        listings.enter(&key("eng"));
        assert_eq!(listings.next(), None, "one request at a time");
        listings.done(&removing);
        answer(&mut listings, "eng", true);
        assert_eq!((listings.next(), listings.listed()), (None, 1));
    }

    #[test]
    fn a_failed_request_is_repeated_and_a_listing_confirmed() {
        let mut listings = Listings::new(600);
        listings.enter(&key("eng"));
        let first = listings.next().unwrap();
        listings.failed(first);
        assert_eq!(listings.next(), None);
        listings.tick(1);
        answer(&mut listings, "eng", true);
        listings.tick(601);
        answer(&mut listings, "eng", true);
        listings.forgotten(|_| true);
        answer(&mut listings, "eng", true);
        // The confirmation that was due without the loss is out of date.
        listings.tick(1_200);
        assert_eq!(listings.next(), None);
        listings.tick(1_201);
        answer(&mut listings, "eng", true);
    }
}

//! Deliveries to the application, and their acknowledgement.

use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::inbox::Ticket;
use crate::message::Message;

/// The messages of a client with explicit acknowledgement.
#[derive(Debug)]
pub struct Deliveries {
    pub(crate) messages: mpsc::Receiver<Delivery>,
    pub(crate) stop: CancellationToken,
}

/// A message with its acknowledgement.
#[derive(Debug)]
pub struct Delivery {
    /// The message.
    pub message: Message,
    /// Acknowledges the message. Use it once the application has handled the message.
    pub ack: AckHandle,
}

/// Acknowledges one message (no effect for a group's message). Acknowledgements on the wire are cumulative: one is
/// sent when every earlier message is acknowledged as well. If the handle is dropped unused, the server sends the
/// message again, unless the mailbox has evicted it; then [`Event::Skipped`](crate::Event::Skipped) names its
/// position.
#[derive(Debug)]
pub struct AckHandle {
    /// `None` for a group's message, which is not acknowledged.
    ticket: Option<Ticket>,
    finished: mpsc::Sender<Finished>,
    handled: bool,
}

impl Deliveries {
    /// Receives the next message; `None`: the client has ended or is shutting down. Cancel-safe.
    pub async fn next(&mut self) -> Option<Delivery> {
        tokio::select! {
            biased;
            () = self.stop.cancelled() => {
                self.messages.close();
                while self.messages.try_recv().is_ok() {} // given back unhandled
                None
            }
            delivery = self.messages.recv() => delivery,
        }
    }
}

impl AckHandle {
    pub(crate) fn new(ticket: Option<Ticket>, finished: mpsc::Sender<Finished>) -> Self {
        Self { ticket, finished, handled: false }
    }

    /// Marks the message as handled, so that it is not sent again.
    pub fn ack(mut self) {
        self.handled = true;
    }
}

impl Drop for AckHandle {
    fn drop(&mut self) {
        // The channel has room for every message that the application has. If it is closed, the client has ended.
        let _ = self.finished.try_send(Finished { ticket: self.ticket, handled: self.handled });
    }
}

/// The application has handled a message, or gives it back.
#[derive(Debug)]
pub(crate) struct Finished {
    /// `None` for a group's message.
    pub(crate) ticket: Option<Ticket>,
    pub(crate) handled: bool,
}

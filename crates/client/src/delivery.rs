//! A message on its way to the application, and its way back.

use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::inbox::Ticket;
use crate::message::Message;

/// Messages to be acknowledged by hand.
#[derive(Debug)]
pub struct Deliveries {
    pub(crate) messages: mpsc::Receiver<Delivery>,
    pub(crate) stop: CancellationToken,
}

/// A message and the right to acknowledge it.
#[derive(Debug)]
pub struct Delivery {
    /// The message.
    pub message: Message,
    /// To be used once the message is safe with the application.
    pub ack: AckHandle,
}

/// Acknowledges one message (of a group: does nothing). Acknowledgements on the wire are cumulative: one is
/// sent when every earlier message is acknowledged too. Dropped unused, the message comes again.
#[derive(Debug)]
pub struct AckHandle {
    /// `None`: of a group's message, which is not acknowledged.
    ticket: Option<Ticket>,
    finished: mpsc::Sender<Finished>,
    handled: bool,
}

impl Deliveries {
    /// The next message; `None`: the client is over or shutting down. Cancel-safe.
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

    /// The message is handled and must not come again.
    pub fn ack(mut self) {
        self.handled = true;
    }
}

impl Drop for AckHandle {
    fn drop(&mut self) {
        // There is a place for every message that is out; a closed channel means a closed client.
        let _ = self.finished.try_send(Finished { ticket: self.ticket, handled: self.handled });
    }
}

/// The application is done with a message, one way or the other.
#[derive(Debug)]
pub(crate) struct Finished {
    /// `None`: of a group's message.
    pub(crate) ticket: Option<Ticket>,
    pub(crate) handled: bool,
}

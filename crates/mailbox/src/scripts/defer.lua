-- defer: takes claims back whose re-send reached no device: that is not the device's failure to answer. Only
-- while the score is still the claimed one. Allowed when Redis is full.
--
-- KEYS  an item: head, timers.
-- ARGV  retry base ms, retry base of a full node ms, retry max ms, retry jitter; then an item: member (app NUL user),
--       claimed score, its devices, NUL between them, each after a letter that says why it was not reached:
--       D  its node is down      F  its node is full
--       V  void: its node is gone   A  away: nobody could be asked
-- Reply now, then an item:
--       {'D'}  deferred
--       {'K'}  kept: the timer has moved since
--       {'U'}, {'E', text}
--
-- The wait doubles with each defer in a row, up to retry max. It is retry max at once if the node is gone: its sessions
-- are gone as well, or they confirm. Any sign that a node has the device again (connect, confirm, an ack that
-- moves the cursor) starts the waits over and brings the due time forward. 'A' does not count as a defer: such
-- an outage ends for all devices at once.

local RETRY_MAX = tonumber(ARGV[3])
RETRY_JITTER = tonumber(ARGV[4])
local DEFERRED, KEPT = 'D', 'K'
local DOWN, FULL, VOID, AWAY = 'D', 'F', 'V', 'A'
local BASES = { [DOWN] = tonumber(ARGV[1]), [FULL] = tonumber(ARGV[2]), [VOID] = RETRY_MAX }

local function defer_device(device, reason)
  local wait = BASES[DOWN]
  if reason ~= AWAY then
    wait = min((BASES[reason] or BASES[DOWN]) * 2 ^ min(device.defers, 30), RETRY_MAX)
    device.defers = min(device.defers + 1, BYTE_MAX)
  end
  device.resends, device.due_at = device.resends - 1, NOW + spread(wait)
end

local function defer(key_at, arg_at)
  local timers, member = KEYS[key_at + 1], ARGV[arg_at]
  local score = call('ZSCORE', timers, member)
  if not score or tonumber(score) ~= tonumber(ARGV[arg_at + 1]) then return { KEPT } end
  local mailbox = find_mailbox(KEYS[key_at])
  if not mailbox then return { KEPT } end
  local reasons = {}
  for reason, name in string.gmatch(ARGV[arg_at + 2], '([^%z])([^%z]+)') do
    reasons[name] = reason
  end
  local devices = other_devices(mailbox)
  for _, device in ipairs(devices) do
    local reason = reasons[device.name]
    if reason and device.due_at > 0 and device.resends > 0 then
      defer_device(device, reason)
      save_device(mailbox, device)
    end
  end
  set_timer(timers, member, devices)
  return { DEFERRED }
end

return each(#KEYS / 2, defer, 2, 3, 5)

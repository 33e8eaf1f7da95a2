-- ack: a device has received everything up to a position. Allowed when Redis is full, because it frees memory.
--
-- KEYS  an item: head, queue, routes; after all items the timers of their shards.
-- ARGV  ttl ms, retry base ms, retry jitter, devices_max, epoch candidate; then an item: member (app NUL user),
--       d:<device>, and, packed (ITEM), which of the timers is its shard's (from 1) and the acknowledged
--       position: epoch, seq, generation, chain; after that the session: "node incarnation connection ".
-- Reply now, then an item:
--       seq of the device's cursor
--       {'R', epoch, generation, seq, chain}  the position is of another history or epoch: the device was reset to this
--                   cursor
--       {'S'}       stale: sent under an older generation
--       {'U'}, {'E', text}

TTL, RETRY_BASE, RETRY_JITTER = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local DEVICES_MAX, EPOCH_CANDIDATE = tonumber(ARGV[4]), ARGV[5]
local RESET, STALE = 'R', 'S'
local ITEM, COUNT = '<HddII', (#ARGV - 5) / 3

-- Whether a device that was reset or not known may be armed: it has a route, and the timer is not already running for
-- another session's.
local function may_arm(routes, name, session, due_at)
  local route = call('HGET', routes, name)
  return route and (due_at == 0 or sub(route, 1, #session) == session)
end

-- Any ack. `stored` is the state and the device.
local function ack_any(key_at, arg_at, stored)
  local head, queue, routes = KEYS[key_at], KEYS[key_at + 1], KEYS[key_at + 2]
  local field, state, device_text = ARGV[arg_at + 1], stored[1], stored[2]
  local name = sub(field, 3)
  local timers_at, epoch, seq, generation, chain, session_at = parse(ITEM, ARGV[arg_at + 2])
  local mailbox = state and parse_mailbox(head, queue, state)
    or new_mailbox(head, queue, EPOCH_CANDIDATE)
  local device = state and device_text and parse_device(name, device_text)
  local is_known = device
  local others = other_devices(mailbox, is_known and name)
  open(mailbox)
  if is_known and device.generation > generation then return { STALE } end
  if not is_known then
    device = new_device(mailbox, name, generation)
    if not add_device(mailbox, routes, device, others, DEVICES_MAX) then return seq end
  end

  local stored_chain = chain_at(mailbox, seq)
  local is_reset = epoch ~= mailbox.epoch or seq > mailbox.newest
    or stored_chain and stored_chain ~= chain
  local has_advanced = false
  if is_reset then
    reset_device(mailbox, device, generation, not is_known and epoch ~= mailbox.epoch)
  else
    device.generation = clamped_generation(device, generation)
    if stored_chain and seq > device.seq then
      device.seq, device.chain, has_advanced = seq, stored_chain, true
    end
  end
  device.used_at = NOW
  local due_at = device.due_at
  if device.seq >= mailbox.newest then
    disarm_device(device)
  elseif has_advanced and due_at > 0 -- it is behind and has a route
    or (is_reset or not is_known)
      and may_arm(routes, name, sub(ARGV[arg_at + 2], session_at), due_at) then
    arm_device(device)
    device.defers = 0
  end
  if has_advanced or keeps_all(mailbox) then trim_acknowledged(mailbox, device, others) end
  call('HSET', head, 's', mailbox_state(mailbox), field, device_state(device))
  if device.due_at ~= due_at then
    others[#others + 1] = device
    set_timer(KEYS[COUNT * 3 + timers_at], ARGV[arg_at], others)
  end
  if is_reset then
    return { RESET, mailbox.epoch, device.generation, device.seq, device.chain }
  end
  return device.seq
end

-- Short path for the usual ack: a user's only device acknowledges more of what is stored, under its generation. It
-- allocates no table and leaves what `ack_any` would leave; everything else goes there.
local function ack(key_at, arg_at)
  local head, queue, field = KEYS[key_at], KEYS[key_at + 1], ARGV[arg_at + 1]
  local timers_at, epoch, seq, generation, chain = parse(ITEM, ARGV[arg_at + 2])
  local stored = call('HMGET', head, 's', field)
  local state, device = stored[1], stored[2]
  if not (state and device and #state == STATE_BYTES and #device == DEVICE_BYTES) then
    return ack_any(key_at, arg_at, stored)
  end
  local mark, mailbox_epoch, oldest, chain_before_oldest, newest, newest_chain, expires_at,
    age_check_at, lowest_keyed, device_count, bytes_before_oldest, bytes_to_newest = parse(STATE, state)
  local device_mark, cursor, _, device_generation, due_at, resends, _, last_attempt =
    parse(DEVICE, device)
  if mark ~= VERSION or device_mark ~= VERSION or device_count ~= 1 or lowest_keyed ~= 0
    or mailbox_epoch ~= epoch or device_generation ~= generation or seq <= cursor or seq < oldest
    or seq > newest or expires_at - NOW < TTL then
    return ack_any(key_at, arg_at, stored)
  end
  if seq == newest then
    if chain ~= newest_chain then return ack_any(key_at, arg_at, stored) end
    call('DEL', queue)
    bytes_before_oldest = bytes_to_newest
    if due_at > 0 then call('ZREM', KEYS[COUNT * 3 + timers_at], ARGV[arg_at]) end
    due_at, resends = 0, 0
  else
    local index = (seq - oldest) * 2
    local stored_chain, bytes = header_end(call('LINDEX', queue, int(index)))
    if chain ~= stored_chain then return ack_any(key_at, arg_at, stored) end
    bytes_before_oldest = bytes
    call('LTRIM', queue, int(index + 2), '-1')
    if due_at > 0 then
      due_at, resends = NOW + spread(RETRY_BASE), 0
      call('ZADD', KEYS[COUNT * 3 + timers_at], int(due_at), ARGV[arg_at])
    end
  end
  state = pack(STATE, VERSION, epoch, seq + 1, chain, newest, newest_chain, expires_at,
    age_check_at, lowest_keyed, device_count, bytes_before_oldest, bytes_to_newest)
  device = pack(DEVICE, VERSION, seq, chain, generation, due_at, resends, NOW, last_attempt, 0)
  call('HSET', head, 's', state, field, device)
  return seq
end

return each(COUNT, ack, 3, 3, 6)

-- connect: a device sent Hello. When Redis is full, users that have nothing there are refused: the caller repeats the
-- call by a variant that Redis allows, and asks it to create nothing.
--
-- KEYS  an item: head, queue, routes, timers.
-- ARGV  ttl ms, retry base ms, retry jitter, devices_max, how long the attempt of an ended session refuses lower ones
--       (ms); then an item: member (app NUL user), device, node, incarnation, connection, attempt, platform, deadline
--       in Redis's time (ms; 0: none), epoch candidate, 1 if the device names a position else 0, and that position:
--       epoch, generation, seq, chain or ''; 1 if a user that has neither mailbox nor route may get one, else 0.
-- Reply now, then an item:
--       {'C', epoch, generation, seq, chain, newest, 1 if the device was reset else 0, node or '', incarnation and
--             connection of the session that it replaces, 1 if entries behind seq were evicted else 0,
--             1 if the mailbox was created else 0}  connected
--       {'S', attempt}  superseded: this newer attempt is connected, or was
--       {'M'}           too many devices, all with routes
--       {'L'}           past its deadline
--       {'N'}           the user has nothing, and may get nothing
--       {'U'}, {'E', text}
--
-- An attempt refuses lower ones while its route exists, and for a while after: no call arrives later than
-- that (its deadline), and a device whose clock went back is not locked out for ever.

TTL, RETRY_BASE, RETRY_JITTER = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local DEVICES_MAX, ATTEMPT_TTL = tonumber(ARGV[4]), tonumber(ARGV[5])
local CONNECTED, SUPERSEDED, TOO_MANY_DEVICES, TOO_LATE, NOT_CREATED = 'C', 'S', 'M', 'L', 'N'

-- A device new to this user starts at the furthest cursor of the others, else before the oldest entry. While the
-- mailbox keeps all it starts before the oldest entry, because Redis may have lost it.
local function first_device_state(mailbox, name, others)
  local seq = mailbox.oldest - 1
  for i, other in ipairs(keeps_all(mailbox) and {} or others) do
    if i == 1 or other.seq > seq then seq = max(other.seq, mailbox.oldest - 1) end
  end
  local device = new_device(mailbox, name, 0)
  device.seq, device.chain = seq, chain_at(mailbox, seq) or mailbox.chain_before_oldest
  return device
end

-- Moves `device` to the position that it names, which begins at `position_at`. Returns the seq and chain from which it
-- reads (below the oldest entry: the entries between were evicted, and the node tells it), and whether it was reset.
local function resume(mailbox, device, is_known, position_at)
  local epoch = tonumber(ARGV[position_at])
  local generation = clamped_generation(device, tonumber(ARGV[position_at + 1]))
  local seq, chain = tonumber(ARGV[position_at + 2]), tonumber(ARGV[position_at + 3])
  local oldest = mailbox.oldest
  if epoch ~= mailbox.epoch or seq > mailbox.newest then
    reset_device(mailbox, device, generation, not is_known and epoch ~= mailbox.epoch)
    return device.seq, device.chain, true
  end
  if seq < oldest - 1 then
    device.seq, device.chain = oldest - 1, mailbox.chain_before_oldest
    device.generation = max(device.generation, generation)
    return seq, chain or 0, false
  end
  local stored_chain = chain_at(mailbox, seq)
  if chain and chain ~= stored_chain then
    reset_device(mailbox, device, generation)
    return device.seq, device.chain, true
  end
  if not chain and is_known and generation < device.generation then
    return device.seq, device.chain, true -- it has not learned of its reset yet
  end
  device.seq, device.chain = seq, stored_chain
  device.generation = max(device.generation, generation)
  return seq, stored_chain, false
end

local function connect(key_at, arg_at)
  local head, queue, routes, timers =
    KEYS[key_at], KEYS[key_at + 1], KEYS[key_at + 2], KEYS[key_at + 3]
  local member, name = ARGV[arg_at], ARGV[arg_at + 1]
  local node, incarnation, connection = ARGV[arg_at + 2], ARGV[arg_at + 3], ARGV[arg_at + 4]
  local attempt, deadline = tonumber(ARGV[arg_at + 5]), tonumber(ARGV[arg_at + 7])
  if deadline > 0 and NOW > deadline then return { TOO_LATE } end
  local stored_route = call('HGET', routes, name)
  local before = stored_route and parse_route(stored_route)
  if before and before.attempt > attempt then return { SUPERSEDED, before.attempt } end
  local mailbox = find_mailbox(head, queue)
  local is_created = not mailbox
  if is_created then
    if ARGV[arg_at + 14] ~= '1' and not before then return { NOT_CREATED } end
    mailbox = new_mailbox(head, queue, ARGV[arg_at + 8])
  end
  local device = find_device(mailbox, name)
  local is_known = device and true or false
  local others = other_devices(mailbox, is_known and name)
  open(mailbox)
  if is_known and not before and device.last_attempt > attempt
    and NOW - device.used_at < ATTEMPT_TTL then
    return { SUPERSEDED, device.last_attempt }
  end
  if not is_known then
    device = first_device_state(mailbox, name, others)
    if not add_device(mailbox, routes, device, others, DEVICES_MAX) then
      return { TOO_MANY_DEVICES }
    end
  end

  local seq, chain, is_reset
  if ARGV[arg_at + 9] == '1' then
    seq, chain, is_reset = resume(mailbox, device, is_known, arg_at + 10)
  else
    is_reset = device.seq > mailbox.newest
    if is_reset then reset_device(mailbox, device, 0) end
    seq, chain = device.seq, device.chain
  end

  if keeps_all(mailbox) then trim_acknowledged(mailbox, device, others) end
  device.used_at, device.last_attempt, device.defers = NOW, attempt, 0
  if device.seq < mailbox.newest then arm_device(device) else disarm_device(device) end
  save(mailbox, device)
  set_route(routes, name, table.concat({ node, incarnation, connection, ARGV[arg_at + 5],
    ARGV[arg_at + 6] }, ' '))
  others[#others + 1] = device
  set_timer(timers, member, others)
  local replaced = before and not (before.node == node and before.incarnation == incarnation
    and before.connection == connection) and before
  return { CONNECTED, mailbox.epoch, device.generation, seq, chain, mailbox.newest,
    is_reset and 1 or 0, replaced and replaced.node or '', replaced and replaced.incarnation or '0',
    replaced and replaced.connection or '0', device.seq > seq and 1 or 0, is_created and 1 or 0 }
end

return each(#KEYS / 4, connect, 4, 15, 6)
